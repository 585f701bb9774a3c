"""`macaw trace`: what a live server did, as a file, and the same again from that file."""
