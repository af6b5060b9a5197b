"""Label maps as a start for labeling: names of segments, and the file formats of annotation tools."""
