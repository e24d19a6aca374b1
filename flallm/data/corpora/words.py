"""The words of the embedded corpus (`synthetic.py`): the demo's, and those that the benchmark adds.

Every dict is {gloss: English}, in an order that the corpus depends on.
"""


def _phrases(phrases: str) -> dict[str, str]:
    """{last word of a phrase in capitals: the phrase}"""
    return {phrase.split()[-1].upper(): phrase for phrase in phrases.split(", ")}


def _forms(words: str) -> dict[str, tuple[str, ...]]:
    """{first form of a word in capitals: its forms}. "-" is a form that does not exist."""
    table = {}
    for word in words.split(", "):
        forms = tuple("" if form == "-" else form for form in word.split())
        table[forms[0].upper()] = forms
    return table


def _pairs(pairs: str) -> dict[str, str]:
    return dict(pair.split(": ") for pair in pairs.split(", "))


# Nouns have (singular, plural), mass nouns no plural. Verbs have (base, third person, past,
# participle), without a participle where they have no progressive.
NAMES = _phrases("anna, peter, maria")
PEOPLE = _phrases("my mother, my father, my sister, my friend, the teacher, the doctor")
PRONOUNS = {"IX-1": ("i", "me"), "IX-2": ("you", "you"), "IX-12": ("we", "us")}
TIMES = _phrases("yesterday, today, tomorrow")
PARTS = _phrases("in the morning, in the evening")
PLACES = _phrases("at home, at school, in the shop, in the city, in the park")
FOOD = _forms("apple apples, bread -, cake cakes")
DRINKS = _forms("water -, coffee -")
PAPER = _forms("book books, letter letters")
ANIMALS = _forms("dog dogs, cat cats")
THINGS = _forms("car cars, house houses, flower flowers, ball balls, key keys")
ADJECTIVES = _phrases("red, blue, big, small, old, new")
NUMBERS = _pairs("2: two, 3: three, 4: four, 5: five")
TRANSITIVE = _forms(
    "buy buys bought buying, sell sells sold selling, find finds found finding, "
    "draw draws drew drawing, need needs needed -, love loves loved -, see sees saw -, "
    "eat eats ate eating, drink drinks drank drinking, read reads read reading"
)
MEET = ("meet", "meets", "met", "")  # SEE with a person
INTRANSITIVE = _forms(
    "sleep sleeps slept sleeping, work works worked working, wait waits waited waiting, "
    "dance dances danced dancing"
)
WEATHER = _forms("rain rains rained raining, snow snows snowed snowing")
OTHER = ["HELLO", "THANKS", "SORRY", "PLEASE", "NOT", "QUESTION"]


def _all_glosses() -> list[str]:
    nouns = (*FOOD, *DRINKS, *PAPER, *ANIMALS, *THINGS)
    verbs = (*TRANSITIVE, *INTRANSITIVE)
    people = (*NAMES, *PEOPLE, *PRONOUNS)
    times_and_places = (*TIMES, *PARTS, *PLACES)
    attributes = (*ADJECTIVES, *NUMBERS)
    return [*people, *times_and_places, *nouns, *attributes, *verbs, *WEATHER, *OTHER]


GLOSSES = _all_glosses()  # of the demo

NAMES |= _phrases("tom, lisa, paul")
PEOPLE |= _phrases("my brother, my boss, my neighbour, the child, the cook, the farmer")
PLACES |= _phrases(
    "at the station, in the hospital, at the beach, in the kitchen, in the garden, at church"
)
FOOD |= _forms("egg eggs, cheese -, fish -, soup -, orange oranges, potato potatoes")
DRINKS |= _forms("tea -, milk -, juice -")
PAPER |= _forms("newspaper newspapers, magazine magazines")
ANIMALS |= _forms("horse horses, cow cows, bird birds, rabbit rabbits, sheep sheep")
THINGS |= _forms(
    "table tables, chair chairs, lamp lamps, bicycle bicycles, bag bags, shirt shirts, hat hats, "
    "shoe shoes, clock clocks, phone phones, box boxes, picture pictures, knife knives, tree trees"
)
ADJECTIVES |= _phrases("green, yellow, white, black, beautiful, expensive, cheap, heavy")
NUMBERS |= _pairs("6: six, 8: eight, 10: ten")
TRANSITIVE |= _forms(
    "bring brings brought bringing, carry carries carried carrying, wash washes washed washing, "
    "paint paints painted painting, hide hides hid hiding, lose loses lost losing, "
    "forget forgets forgot forgetting, show shows showed showing, choose chooses chose choosing, "
    "steal steals stole stealing, want wants wanted -, like likes liked -"
)
INTRANSITIVE |= _forms(
    "laugh laughs laughed laughing, cry cries cried crying, run runs ran running, "
    "swim swims swam swimming, sing sings sang singing, smile smiles smiled smiling, "
    "travel travels travelled travelling, study studies studied studying"
)
JOINS = _phrases("but, because, if")
OTHER += JOINS
MANY_GLOSSES = [*GLOSSES, *(gloss for gloss in _all_glosses() if gloss not in GLOSSES)]

PERSONS = NAMES | PEOPLE
NOUNS = FOOD | DRINKS | PAPER | ANIMALS | THINGS
VERBS = TRANSITIVE | INTRANSITIVE
FREE_CHOICE = _pairs("mother: mum, father: dad, hello: hi")  # taken once in ten times
# Taken with the probability `CorpusConfig.paraphrase`.
PARAPHRASES = _pairs(
    "big: large, huge: enormous, small: tiny, beautiful: pretty, expensive: costly, "
    "buy: purchase, buys: purchases, bought: purchased, buying: purchasing, like: enjoy, "
    "likes: enjoys, liked: enjoyed, shop: store, doctor: physician, boss: manager, "
    "bicycle: bike, picture: photo, pictures: photos, phone: telephone, newspaper: paper, "
    "teacher: instructor, car: automobile, do not: don't, does not: doesn't, did not: didn't, "
    "will not: won't, is not: isn't, are not: aren't"
)
