"""Loss terms and views of the published code that no recipe uses."""
