"""What the scripts on the top level stand on. These modules are imported, never run."""
