"""The networks behind `Backbone`: timm's, DINO's, and their weight files."""
