"""The networks behind `Backbone`: timm's, DINO's, and safe reading of weight files."""
