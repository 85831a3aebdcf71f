"""GenLIP inside other projects' tools."""
