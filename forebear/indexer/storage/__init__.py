"""What lies in an index folder: Arrow files, the manifest, the journal, FAISS indexes, locks."""
