"""Care of a lake's label table: look whether it is sound, make room, merge small files."""
