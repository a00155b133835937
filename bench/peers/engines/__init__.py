"""One file an engine; importing it registers its peers."""
