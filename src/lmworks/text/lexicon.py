"""The words of the built-in language: pronounceable inventions with their English, and the endings of its noun classes.

Every form is unique, so a word's kind and class can be read off it; which class a noun belongs to has to be learned.
"""

from __future__ import annotations

from dataclasses import dataclass

from lmworks.text.grammar import Rule, Uniform

CLASSES = 8
CONSONANTS, VOWELS = "bdfgklmnprstvz", "aeiou"
PARTICLES = ("agent", "patient", "place", "who", "not", "end", "and", "question", "which", "his", "object")
NAMES, CLANS, PLACES = 32, 6, 16
ANIMALS = "dog cat horse cow goat sheep wolf fox bear hare mouse crow owl duck frog snake"
THINGS = (
    "bread stone tree house boat knife rope lamp door cup drum basket ladder hammer wheel bell book coat garden well "
    "bridge fire letter apple cheese honey salt candle blanket mirror ring shoe"
)
ADJECTIVES = (
    "small big old young red green blue black white quick slow tall short strong weak wise foolish quiet loud thin"
)
ADVERBS = "often gladly slowly suddenly again today secretly early"
GOOD = (
    "help/helped praise/praised feed/fed heal/healed save/saved thank/thanked teach/taught protect/protected "
    "comfort/comforted reward/rewarded free/freed warm/warmed"
)
BAD = (
    "hurt/hurt rob/robbed insult/insulted scare/scared betray/betrayed attack/attacked curse/cursed poison/poisoned "
    "trap/trapped burn/burned cheat/cheated kick/kicked"
)
WELL = "sing/sang laugh/laughed dance/danced rest/rested smile/smiled play/played"
ILL = "weep/wept fall/fell starve/starved suffer/suffered drown/drowned fail/failed"


@dataclass(frozen=True)
class Lexicon:
    """Particles by name, endings by class, and the rules of every symbol that is one word."""

    name: str
    particles: dict[str, str]
    rules: dict[str, list[Rule]]


class Inventor:
    """Makes up words that nobody has used yet."""

    def __init__(self, seed: int) -> None:
        self.uniform, self.taken = Uniform(seed), set[str]()

    def invent(self, shape: str, endings: tuple[str, ...] = ("",)) -> str:
        """Return a new stem of this shape, c for a consonant and v for a vowel, unused with every ending."""
        while True:
            stem = "".join(self.pick(CONSONANTS if letter == "c" else VOWELS) for letter in shape)
            forms = {stem + ending for ending in endings}
            if not forms & self.taken:
                self.taken |= forms
                return stem

    def pick(self, letters: str) -> str:
        """Return one of these letters."""
        return letters[self.uniform.index(len(letters))]


def make_lexicon(seed: int) -> Lexicon:
    """Invent a lexicon; the same seed gives the same words on every machine."""
    inventor = Inventor(seed)
    endings: tuple[str, ...] = ()
    while len(endings) < CLASSES:
        endings += (inventor.invent("vc"),)
    particles = {name: inventor.invent("cv") for name in PARTICLES}
    rules: dict[str, list[Rule]] = {}

    def add(symbol: str, word: str, english: tuple[str, ...]) -> None:
        options = rules.setdefault(symbol, [])
        options.append(Rule(1 / (len(options) + 4), (word,), english))  # few words are frequent, many are rare

    for c in range(CLASSES):
        add(f"Poss.{c}", particles["his"] + endings[c], ("their own",))
        add(f"Mark.{c}", particles["object"] + endings[c], ("",))
    inventor.taken |= {rule.parts[0] for options in rules.values() for rule in options}
    for i in range(NAMES):
        name = inventor.invent("cvcvcv")
        add(f"Given.{i % CLASSES}", name, (name.capitalize(),))
    for symbol, words in (("Animal", ANIMALS), ("Thing", THINGS)):
        for i, english in enumerate(words.split()):
            add(f"{symbol}.{i % CLASSES}", inventor.invent("cvcv"), (english,))
    for symbol, count, shape in (("Clan", CLANS, "cvccv"), ("Spot", PLACES, "vccv")):
        for _ in range(count):
            name = inventor.invent(shape)
            add(symbol, name, (name.capitalize(),))
    for adverb in ADVERBS.split():
        add("Adverb", inventor.invent("vcvcv"), (adverb,))
    inflected = (
        ("Adj", "", ADJECTIVES),
        ("Do", ".+", GOOD),
        ("Do", ".-", BAD),
        ("Act", ".+", WELL),
        ("Act", ".-", ILL),
    )
    for symbol, mood, words in inflected:
        for english in words.split():
            stem = inventor.invent("vcc" if symbol == "Adj" else "cvc", endings)
            for c in range(CLASSES):
                add(f"{symbol}.{c}{mood}", stem + endings[c], tuple(english.split("/")))
    return Lexicon(inventor.invent("cvcvc").capitalize(), particles, rules)
