"""The embedded data set: pictures composed of open-licensed emoji, with captions and classes."""
