"""Texts about everyday things, in English: what a model is held to where nobody gives texts of their own."""

from __future__ import annotations

import random
from itertools import product

GENERAL = 2_000
"""How many there are."""
_THINGS = """
a dog; a cat; a horse; a cow; a sheep; an elephant; a bear; a zebra; a giraffe; a lion; a tiger; a monkey; a
rabbit; a mouse; a bird; an owl; a duck; a chicken; a penguin; a fish; a shark; a whale; a turtle; a snake;
a frog; a butterfly; a bee; a spider; a tree; a flower; a rose; a mushroom; a leaf; grass; a forest; a
mountain; a river; a lake; a beach; the sea; a desert; an island; a waterfall; the sky; clouds; a sunset;
snow; rain; the moon; a volcano; a rock; sand; a field; a garden; an apple; a banana; an orange; a lemon;
grapes; a strawberry; a tomato; a carrot; a potato; an onion; bread; cheese; an egg; a pizza; a sandwich; a
hamburger; a bowl of rice; a bowl of soup; a salad; a cake; ice cream; chocolate; a cup of coffee; a cup of
tea; a bottle of water; a glass of wine; a plate of food; a fork; a knife; a spoon; a car; a bus; a truck; a
bicycle; a motorcycle; a train; an airplane; a helicopter; a boat; a ship; a tractor; a taxi; a fire engine;
a traffic light; a stop sign; a road; a bridge; a street; a city; a village; a house; a skyscraper; a
church; a temple; a castle; a tower; a school; a hospital; a factory; a shop; a market; a restaurant; a
station; an airport; a stadium; a museum; a library; a kitchen; a bathroom; a bedroom; a living room; an
office; a window; a door; a staircase; a fence; a chair; a table; a sofa; a bed; a lamp; a mirror; a clock;
a vase; a book; a newspaper; a pencil; scissors; a key; a bag; a suitcase; an umbrella; a hat; a shirt; a
dress; a jacket; trousers; shoes; gloves; glasses; a watch; a ring; a phone; a laptop; a computer keyboard;
a television; a camera; a microphone; headphones; a guitar; a piano; a violin; a drum; a ball; a football; a
tennis racket; a skateboard; skis; a surfboard; a kite; a toy; a teddy bear; a doll; a puzzle; a candle; a
balloon; a gift; a flag; a map; a painting; a drawing; a statue; a poster; a logo; a diagram; a screenshot;
handwriting; a page of text; a receipt; a hammer; a screwdriver; a saw; a ladder; a pipe; a wheel; an
engine; a circuit board; a battery; a pill; a syringe; a microscope; an x-ray; a satellite; a telescope; a
robot; a man; a woman; a child; a baby; an old man; a crowd; a family; a couple; a doctor; a nurse; a
teacher; a student; a farmer; a cook; a worker; a soldier; a police officer; a musician; a dancer; a
football player; a runner; a face; a hand; an eye; somebody smiling; somebody reading; somebody cooking;
somebody running; somebody swimming; somebody sleeping; somebody riding a bicycle; somebody talking on the
phone; people at a party; people in a meeting; people eating dinner; people walking down the street;
children playing in a park
"""
_FORMS = (
    "a photo of {}",
    "{}",
    "a close-up photo of {}",
    "a black and white photo of {}",
    "a drawing of {}",
    "{} in the background",
    "a blurry photo of {}",
    "{} at night",
    "{} on a white background",
    "{} on a wooden floor",
    "{} outdoors on a sunny day",
    "{}, seen from above",
)
_TWO = ("{} and {}", "{} next to {}", "{} in front of {}", "a photo of {} with {}")


def general_texts() -> tuple[str, ...]:
    """Make the texts: things in several forms of words, alone and two together; always the same ones."""
    things = [thing.strip() for thing in _THINGS.replace("\n", " ").split(";")]
    draw = random.Random(0)
    alone = [form.format(thing) for thing, form in product(things, _FORMS)]
    two = [form.format(*draw.sample(things, 2)) for form in _TWO for _ in range(len(things))]
    return tuple(draw.sample(list(dict.fromkeys([*alone, *two])), GENERAL))
