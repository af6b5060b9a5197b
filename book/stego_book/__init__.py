"""The book's own code: studies, figures, pre-training of the embedded backbones, and the notebook runner."""
