"""The public names of `clipgraft.emoji`."""

from .classes import emoji_prompts as emoji_prompts
from .classes import write_classes as write_classes
from .scenes import EmojiScenes as EmojiScenes
from .scenes import write_scenes as write_scenes
