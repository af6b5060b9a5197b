"""Out of the project: a trained run as one ONNX file (`Run.export`)."""
