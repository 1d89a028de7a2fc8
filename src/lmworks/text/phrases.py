"""The grammar of the built-in language: which phrases there are, what agrees with what, and their English.

In the symbols, `.3` is a noun class and `.+` or `.-` the mood of a clause: good deeds or bad ones. Phrases with a verb
have two English forms, base and past ("see the dog", "saw the dog"), whole clauses a statement and a question.
"""

from __future__ import annotations

from lmworks.text.grammar import Rule
from lmworks.text.lexicon import CLASSES, Lexicon

MOODS = ("+", "-")
ASKED, NEGATED, RELATIVE, NEGATED_RELATIVE, OWNED = 0.2, 0.25, 0.4, 0.2, 0.25  # how often
PLAIN, CHAINED, OBJECT_FIRST = 0.45, 0.3, 0.25  # clauses: one verb, two verbs, the object in front


class Phrases:
    """Collects the rules; in `parts`, a particle goes by its name."""

    def __init__(self, lexicon: Lexicon) -> None:
        self.particles, self.rules = lexicon.particles, dict(lexicon.rules)
        self.add("Sentence", 1 - ASKED, "Clause .", "{0[0]}.")
        self.add("Sentence", ASKED, "question Clause ?", "{0[1]}?")
        self.add("Spot_name", 1, "Spot", "{0}", tag="place")
        self.add("Place", 1, "Spot_name place", "in {0}")
        self.option("Maybe_place", 0.3, "Place")
        self.option("Maybe_adverb", 0.2, "Adverb")
        for c in range(CLASSES):
            self.add_names(c)
            self.add_relatives(c)
            for mood in MOODS:
                self.add_deeds(c, mood)
                self.add_clauses(c, mood, negated=False)
                self.add_clauses(c, mood, negated=True)

    def add(self, symbol: str, weight: float, parts: str, *english: str, tag: str = "") -> None:
        """Add one rule."""
        words = tuple(self.particles.get(part, part) for part in parts.split())
        self.rules.setdefault(symbol, []).append(Rule(weight, words, english, tag))

    def option(self, symbol: str, chance: float, part: str) -> None:
        """Add a symbol that is another one, or nothing."""
        self.add(symbol, chance, part, "{0}")
        self.add(symbol, 1 - chance, "", "")

    def add_names(self, c: int) -> None:
        """Add what names something of class c, with its case: `Subject` acts, `Object` is acted upon."""
        self.add(f"Name.{c}", 0.8, f"Given.{c}", "{0}", tag="person")
        self.add(f"Name.{c}", 0.2, f"Given.{c} Clan", "{0} {1}", tag="person")
        self.add(f"Beast.{c}", 1, f"Animal.{c}", "{0}", tag="animal")
        self.add(f"Item.{c}", 0.6, f"Thing.{c}", "{0}")
        self.add(f"Item.{c}", 0.4, f"Beast.{c}", "{0}")
        for symbol, kind, article, weight in (
            ("Agent", "Name", "", 0.5),
            ("Agent", "Beast", "the", 0.5),
            ("Patient", "Name", "", 0.25),
            ("Patient", "Item", "the", 0.75),
        ):
            self.add(f"{symbol}.{c}", 0.75 * weight, f"{kind}.{c}", f"{article} {{0}}")
            self.add(f"{symbol}.{c}", 0.25 * weight, f"{kind}.{c} Adj.{c}", "the {1} {0}")
        self.add(f"Subject.{c}", 1, f"Agent.{c} agent", "{0}", tag="agent")
        self.add(f"Object.{c}", 1, f"Patient.{c} object", "{0}", tag="patient")
        for owner in range(CLASSES):
            self.add(f"Own.{owner}.{c}", 1, f"Item.{c} Poss.{owner} object", "{1} {0}", tag="patient")

    def add_relatives(self, c: int) -> None:
        """Add relative clauses to a noun of class c: it is their agent, or their object."""
        self.add(f"Person_or_beast.{c}", 0.5, f"Given.{c}", "{0}", tag="person")
        self.add(f"Person_or_beast.{c}", 0.5, f"Beast.{c}", "the {0}")
        for mood in MOODS:
            self.add(f"Any.{c}", 0.5, f"Do.{c}.{mood}", "{0[0]}", "{0[1]}")
        for d in range(CLASSES):
            other = f"Person_or_beast.{d}"
            yes, no = 1 - NEGATED_RELATIVE, NEGATED_RELATIVE
            self.add(f"Which.{c}", yes, f"which {other} object Any.{c} Mark.{d}", "who {1[1]} {0}")
            self.add(f"Which.{c}", no, f"which not {other} object Any.{c} Mark.{d}", "who did not {1[0]} {0}")
            self.add(f"Which.{c}", yes, f"which {other} agent Any.{d} Mark.{c}", "whom {0} {1[1]}")
            self.add(f"Which.{c}", no, f"which not {other} agent Any.{d} Mark.{c}", "whom {0} did not {1[0]}")
        self.add(f"Full.{c}", 1 - RELATIVE, f"Agent.{c} agent", "{0}", tag="agent")
        self.add(f"Full.{c}", RELATIVE, f"Agent.{c} Which.{c} agent", "{0} {1}", tag="agent")

    def add_deeds(self, c: int, mood: str) -> None:
        """Add what an agent of class c does: `Deed` with place and adverb, `Next` briefly."""
        do, act = f"Do.{c}.{mood}", f"Act.{c}.{mood}"
        intransitive = 0.25 * CLASSES
        self.add(f"Deed.{c}.{mood}", intransitive, f"Place Maybe_adverb {act}", "{2[0]} {1} {0}", "{2[1]} {1} {0}")
        for d in range(CLASSES):
            for symbol, share in ((f"Object.{d}", 1 - OWNED), (f"Own.{c}.{d}", OWNED)):
                whole, brief = f"Maybe_place Maybe_adverb {symbol} {do} Mark.{d}", f"{symbol} {do} Mark.{d}"
                self.add(f"Deed.{c}.{mood}", 0.75 * share, whole, "{3[0]} {2} {1} {0}", "{3[1]} {2} {1} {0}")
                self.add(f"Next.{c}.{mood}", share, brief, "{1[0]} {0}", "{1[1]} {0}")

    def add_clauses(self, c: int, mood: str, *, negated: bool) -> None:
        """Add the main clauses with an agent of class c."""
        open_, close = ("not", "end") if negated else ("", "")
        weight = NEGATED if negated else 1 - NEGATED
        deed, do = f"Deed.{c}.{mood}", f"Do.{c}.{mood}"

        def add(share: float, parts: str, verb: int, then: str) -> None:
            agent = "{1}" if verb == 3 else "{0}"
            said = f"{agent} did not {{{verb}[0]}} {then}" if negated else f"{agent} {{{verb}[1]}} {then}"
            asked = f"did {agent} {'not' if negated else ''} {{{verb}[0]}} {then.replace('[1]', '[0]')}"
            self.add("Clause", weight * share, parts, said.replace("[1]", "[0]") if negated else said, asked)

        add(PLAIN, f"Full.{c} {open_} {deed} {close}", 1, "")
        add(
            CHAINED,
            f"Subject.{c} {open_} {deed} and Next.{c}.{mood} {close}",
            1,
            "or {2[0]}" if negated else "and {2[1]}",
        )
        for d in range(CLASSES):
            parts = f"Object.{d} Subject.{c} {open_} Maybe_adverb {do} Mark.{d} {close}"
            add(OBJECT_FIRST / CLASSES, parts, 3, "{0} {2}")
