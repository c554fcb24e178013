"""Images and captions: reading, checking, loading, and the embedded EmojiScenes."""
