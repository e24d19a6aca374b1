"""The words of the embedded corpus (`synthetic.py`): those of the demo, and what the benchmark has besides."""

# gloss -> English. Nouns: (singular, plural), a plural of "" is a mass noun. Verbs: (base, third person, past, participle).
NAMES = {"ANNA": "anna", "PETER": "peter", "MARIA": "maria"}
PEOPLE = {
    "MOTHER": "my mother",
    "FATHER": "my father",
    "SISTER": "my sister",
    "FRIEND": "my friend",
    "TEACHER": "the teacher",
    "DOCTOR": "the doctor",
}
PRONOUNS = {"IX-1": ("i", "me"), "IX-2": ("you", "you"), "IX-12": ("we", "us")}
TIMES = {"YESTERDAY": "yesterday", "TODAY": "today", "TOMORROW": "tomorrow"}
PARTS = {"MORNING": "in the morning", "EVENING": "in the evening"}
MAX_POSITIONS = {
    "HOME": "at home",
    "SCHOOL": "at school",
    "SHOP": "in the shop",
    "CITY": "in the city",
    "PARK": "in the park",
}
FOOD = {"APPLE": ("apple", "apples"), "BREAD": ("bread", ""), "CAKE": ("cake", "cakes")}
DRINKS = {"WATER": ("water", ""), "COFFEE": ("coffee", "")}
PAPER = {"BOOK": ("book", "books"), "LETTER": ("letter", "letters")}
ANIMALS = {"DOG": ("dog", "dogs"), "CAT": ("cat", "cats")}
THINGS = {
    "CAR": ("car", "cars"),
    "HOUSE": ("house", "houses"),
    "FLOWER": ("flower", "flowers"),
    "BALL": ("ball", "balls"),
    "KEY": ("key", "keys"),
}
ADJECTIVES = {
    "RED": "red",
    "BLUE": "blue",
    "BIG": "big",
    "SMALL": "small",
    "OLD": "old",
    "NEW": "new",
}
NUMBERS = {"2": "two", "3": "three", "4": "four", "5": "five"}
TRANSITIVE = {
    "BUY": ("buy", "buys", "bought", "buying"),
    "SELL": ("sell", "sells", "sold", "selling"),
    "FIND": ("find", "finds", "found", "finding"),
    "DRAW": ("draw", "draws", "drew", "drawing"),
    "NEED": ("need", "needs", "needed", ""),
    "LOVE": ("love", "loves", "loved", ""),
    "SEE": ("see", "sees", "saw", ""),
    "EAT": ("eat", "eats", "ate", "eating"),
    "DRINK": ("drink", "drinks", "drank", "drinking"),
    "READ": ("read", "reads", "read", "reading"),
}
MEET = ("meet", "meets", "met", "")  # SEE with a person
INTRANSITIVE = {
    "SLEEP": ("sleep", "sleeps", "slept", "sleeping"),
    "WORK": ("work", "works", "worked", "working"),
    "WAIT": ("wait", "waits", "waited", "waiting"),
    "DANCE": ("dance", "dances", "danced", "dancing"),
}
WEATHER = {
    "RAIN": ("rain", "rains", "rained", "raining"),
    "SNOW": ("snow", "snows", "snowed", "snowing"),
}
OTHER = ["HELLO", "THANKS", "SORRY", "PLEASE", "NOT", "QUESTION"]


def _all() -> list[str]:
    nouns, verbs = (*FOOD, *DRINKS, *PAPER, *ANIMALS, *THINGS), (*TRANSITIVE, *INTRANSITIVE)
    return [
        *NAMES,
        *PEOPLE,
        *PRONOUNS,
        *TIMES,
        *PARTS,
        *MAX_POSITIONS,
        *nouns,
        *ADJECTIVES,
        *NUMBERS,
        *verbs,
        *WEATHER,
        *OTHER,
    ]


GLOSSES = _all()

NAMES |= {"TOM": "tom", "LISA": "lisa", "PAUL": "paul"}
PEOPLE |= {
    "BROTHER": "my brother", "BOSS": "my boss", "NEIGHBOUR": "my neighbour", "CHILD": "the child", "COOK": "the cook", "FARMER": "the farmer",
}  # fmt: skip
MAX_POSITIONS |= {
    "STATION": "at the station", "HOSPITAL": "in the hospital", "BEACH": "at the beach", "KITCHEN": "in the kitchen", "GARDEN": "in the garden", "CHURCH": "at church",
}  # fmt: skip
FOOD |= {
    "EGG": ("egg", "eggs"),
    "CHEESE": ("cheese", ""),
    "FISH": ("fish", ""),
    "SOUP": ("soup", ""),
    "ORANGE": ("orange", "oranges"),
    "POTATO": ("potato", "potatoes"),
}
DRINKS |= {"TEA": ("tea", ""), "MILK": ("milk", ""), "JUICE": ("juice", "")}
PAPER |= {"NEWSPAPER": ("newspaper", "newspapers"), "MAGAZINE": ("magazine", "magazines")}
ANIMALS |= {
    "HORSE": ("horse", "horses"),
    "COW": ("cow", "cows"),
    "BIRD": ("bird", "birds"),
    "RABBIT": ("rabbit", "rabbits"),
    "SHEEP": ("sheep", "sheep"),
}
THINGS |= {
    "TABLE": ("table", "tables"), "CHAIR": ("chair", "chairs"), "LAMP": ("lamp", "lamps"), "BICYCLE": ("bicycle", "bicycles"), "BAG": ("bag", "bags"),
    "SHIRT": ("shirt", "shirts"), "HAT": ("hat", "hats"), "SHOE": ("shoe", "shoes"), "CLOCK": ("clock", "clocks"), "PHONE": ("phone", "phones"),
    "BOX": ("box", "boxes"), "PICTURE": ("picture", "pictures"), "KNIFE": ("knife", "knives"), "TREE": ("tree", "trees"),
}  # fmt: skip
ADJECTIVES |= {
    "GREEN": "green", "YELLOW": "yellow", "WHITE": "white", "BLACK": "black", "BEAUTIFUL": "beautiful", "EXPENSIVE": "expensive", "CHEAP": "cheap", "HEAVY": "heavy",
}  # fmt: skip
NUMBERS |= {"6": "six", "8": "eight", "10": "ten"}
TRANSITIVE |= {
    "BRING": ("bring", "brings", "brought", "bringing"), "CARRY": ("carry", "carries", "carried", "carrying"), "WASH": ("wash", "washes", "washed", "washing"),
    "PAINT": ("paint", "paints", "painted", "painting"), "HIDE": ("hide", "hides", "hid", "hiding"), "LOSE": ("lose", "loses", "lost", "losing"),
    "FORGET": ("forget", "forgets", "forgot", "forgetting"), "SHOW": ("show", "shows", "showed", "showing"), "CHOOSE": ("choose", "chooses", "chose", "choosing"),
    "STEAL": ("steal", "steals", "stole", "stealing"), "WANT": ("want", "wants", "wanted", ""), "LIKE": ("like", "likes", "liked", ""),
}  # fmt: skip
INTRANSITIVE |= {
    "LAUGH": ("laugh", "laughs", "laughed", "laughing"), "CRY": ("cry", "cries", "cried", "crying"), "RUN": ("run", "runs", "ran", "running"),
    "SWIM": ("swim", "swims", "swam", "swimming"), "SING": ("sing", "sings", "sang", "singing"), "SMILE": ("smile", "smiles", "smiled", "smiling"),
    "TRAVEL": ("travel", "travels", "travelled", "travelling"), "STUDY": ("study", "studies", "studied", "studying"),
}  # fmt: skip
JOINS = {"BUT": "but", "BECAUSE": "because", "IF": "if"}
OTHER += JOINS
MANY_GLOSSES = [*GLOSSES, *(gloss for gloss in _all() if gloss not in GLOSSES)]

NOUNS = FOOD | DRINKS | PAPER | ANIMALS | THINGS
VERBS = TRANSITIVE | INTRANSITIVE
FREE_CHOICE = {"mother": "mum", "father": "dad", "hello": "hi"}  # taken once in ten times
PARAPHRASES = {  # as often as `Dials.paraphrase` says
    "big": "large", "huge": "enormous", "small": "tiny", "beautiful": "pretty", "expensive": "costly", "buy": "purchase", "buys": "purchases", "bought": "purchased",
    "buying": "purchasing", "like": "enjoy", "likes": "enjoys", "liked": "enjoyed", "shop": "store", "doctor": "physician", "boss": "manager", "bicycle": "bike",
    "picture": "photo", "pictures": "photos", "phone": "telephone", "newspaper": "paper", "teacher": "instructor", "car": "automobile", "do not": "don't",
    "does not": "doesn't", "did not": "didn't", "will not": "won't", "is not": "isn't", "are not": "aren't",
}  # fmt: skip
