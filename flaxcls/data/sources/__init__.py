"""One file a source: each `read` returns the splits that lie on disk, nothing drawn or resized."""
