"""Methods: which numbers of a scheme are chosen for a weight. One file each."""
