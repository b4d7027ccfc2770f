"""The embedded world: vocabulary, glyphs, scenes, captions, tokens."""
