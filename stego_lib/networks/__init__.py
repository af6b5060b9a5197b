"""Networks for `Backbone`, from timm, DINO and STEGO's authors, and their weight files."""
