"""Words of the retrieval tasks: no word of a fact occurs in the sentences around it."""

import random

OBJECTS = (
    "candle bottle basket mirror hammer blanket button carpet feather lantern marble needle "
    "pillow saddle umbrella violin wallet camera guitar helmet jacket magnet piano rocket spoon "
    "whistle kettle pencil anchor ladder"
).split()
NAMES = (
    "Anna Peter Maria James Sarah Thomas Emma Daniel Laura Vincent Julia Henry Clara Oscar Frank "
    "George Ivan Kevin Nancy Quentin Robert Walter William Zoe"
).split()
CITIES = (
    "Lisbon Oslo Cairo Delhi Kyoto Boston Dublin Madrid Vienna Prague Athens Havana Manila Nairobi "
    "Seoul Berlin Paris Rome Moscow London Tokyo Sydney Denver Chicago Toronto Geneva Milan Warsaw"
).split()
SECRETS = (
    "apple zebra lemon tiger silver desert forest island rabbit orange valley engine copper "
    "ocean planet winter yellow velvet jungle kingdom honey thunder cotton eagle ginger"
).split()

WHO = (
    "The teacher|A farmer|My neighbor|The old sailor|A young painter|The baker|Our guide|"
    "The doctor|A tall stranger|The librarian|The mayor|A quiet student|The gardener|"
    "A tired driver|The carpenter"
).split("|")
DID = (
    "walked to|looked at|talked about|waited near|returned to|painted|remembered|described|"
    "visited|cleaned|drew|photographed|found|left|crossed"
).split("|")
WHAT = (
    "the river|the old bridge|a small garden|the market|the empty station|a stone wall|"
    "the harbor|a wooden boat|the library|the hill|a narrow street|the kitchen|the orchard|"
    "a broken clock|the village square"
).split("|")
WHEN = (
    "in the morning|after lunch|before the rain|on a cold day|without a sound|late at night|"
    "for an hour|once again|with a smile|in early spring|every week|at noon|during the storm|"
    "before sunset|last year"
).split("|")


def filler_sentence(rng: random.Random) -> str:
    """A plain sentence, one of 50,625."""
    return f"{rng.choice(WHO)} {rng.choice(DID)} {rng.choice(WHAT)} {rng.choice(WHEN)}."
