"""Generator architectures: one file each, behind one small interface."""
