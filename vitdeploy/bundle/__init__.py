"""The folder that everything after the export reads: its manifest, its files, its golden tensors."""
