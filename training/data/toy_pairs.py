"""Generated English-French sentence pairs: a small parallel corpus that needs no download.

    I love cats                               J'aime les chats
    She does not see him                      Elle ne le voit pas
    My small black dog watches your sister    Mon petit chien noir regarde ta sœur

Words agree in gender, number and person, and some lose their vowel before another. Colors follow
the noun, pronouns precede the verb, `ne` and `pas` enclose it, and "look for" is one word. So no
word-by-word translation is right.
"""

import functools
from collections.abc import Iterator
from random import Random
from typing import NamedTuple

TOY_PAIRS = "toy-pairs"
"""The value of `--data`."""
SPLIT_SIZES = {"train": 8000, "validation": 500, "test": 1000}
FIRST_PAIR = "I love cats", "J'aime les chats"
"""The first pair of the validation split; so it is not in the training split."""
CLAUSES = 1, 1, 1, 2, 2, 3
"""Numbers of clauses of a sentence, equally probable."""

Pair = tuple[str, str]
"""A phrase, a clause or a sentence in English and in French."""


class Noun(NamedTuple):
    """English and French, singular and plural."""

    en: str
    en_plural: str
    fr: str
    fr_plural: str
    feminine: bool = False


class Adjective(NamedTuple):
    """English synonyms, and French, masculine and feminine."""

    en: tuple[str, ...]
    fr: str
    fr_feminine: str


class Verb(NamedTuple):
    """English synonyms, what follows them, and the French forms for I, you, he, we and they."""

    en: tuple[str, ...]
    particle: str
    fr: tuple[str, str, str, str, str]


class Subject(NamedTuple):
    """A subject in English and French, and the index of its form in `Verb.fr`."""

    en: str
    fr: str
    form: int


ANIMALS = [
    Noun("cat", "cats", "chat", "chats"),
    Noun("dog", "dogs", "chien", "chiens"),
    Noun("bird", "birds", "oiseau", "oiseaux"),
    Noun("horse", "horses", "cheval", "chevaux"),
]
PEOPLE = [
    Noun("boy", "boys", "garçon", "garçons"),
    Noun("girl", "girls", "fille", "filles", feminine=True),
    Noun("sister", "sisters", "sœur", "sœurs", feminine=True),
    Noun("aunt", "aunts", "tante", "tantes", feminine=True),
]
FOODS = [
    Noun("apple", "apples", "pomme", "pommes", feminine=True),
    Noun("orange", "oranges", "orange", "oranges", feminine=True),
    Noun("cake", "cakes", "gâteau", "gâteaux"),
    Noun("egg", "eggs", "œuf", "œufs"),
]
THINGS = [
    Noun("house", "houses", "maison", "maisons", feminine=True),
    Noun("car", "cars", "voiture", "voitures", feminine=True),
    Noun("tree", "trees", "arbre", "arbres"),
    Noun("book", "books", "livre", "livres"),
]
SIZES = [  # before the noun
    Adjective(("small", "little"), "petit", "petite"),
    Adjective(("big", "large"), "grand", "grande"),
]
COLORS = [  # after the noun in French
    Adjective(("black",), "noir", "noire"),
    Adjective(("white",), "blanc", "blanche"),
    Adjective(("red",), "rouge", "rouge"),
    Adjective(("green",), "vert", "verte"),
    Adjective(("blue",), "bleu", "bleue"),
]
EAT = Verb(("eat",), "", ("mange", "manges", "mange", "mangeons", "mangent"))
VERBS = [
    Verb(("love", "like"), "", ("aime", "aimes", "aime", "aimons", "aiment")),
    Verb(("see",), "", ("vois", "vois", "voit", "voyons", "voient")),
    Verb(("hear",), "", ("entends", "entends", "entend", "entendons", "entendent")),
    Verb(("look",), "for", ("cherche", "cherches", "cherche", "cherchons", "cherchent")),
    Verb(("find",), "", ("trouve", "trouves", "trouve", "trouvons", "trouvent")),
    Verb(("draw",), "", ("dessine", "dessines", "dessine", "dessinons", "dessinent")),
    Verb(("watch",), "", ("regarde", "regardes", "regarde", "regardons", "regardent")),
]
PRONOUNS = [
    Subject("I", "je", 0),
    Subject("you", "tu", 1),
    Subject("he", "il", 2),
    Subject("she", "elle", 2),
    Subject("we", "nous", 3),
    Subject("they", "ils", 4),
]
OBJECT_PRONOUNS = [
    Subject("me", "me", 0),
    Subject("you", "te", 1),
    Subject("him", "le", 2),
    Subject("her", "la", 2),
    Subject("us", "nous", 3),
    Subject("them", "les", 4),
]
SAME_PERSON = [{0, 3}, {1}]
"""Forms of a subject and an object that would be the same person."""
DETERMINERS = {
    "the": ("le", "la", "les"),
    "my": ("mon", "ma", "mes"),
    "your": ("ton", "ta", "tes"),
    "this": ("ce", "cette", "ces"),
}
"""French forms: masculine, feminine and plural."""
CONJUNCTIONS = {"and": "et", "but": "mais", "when": "quand"}

ELIDED = {"je", "ne", "me", "te", "le", "la"}
"""Words that end in an apostrophe before a vowel."""
BEFORE_VOWEL = {"ma": "mon", "ta": "ton", "ce": "cet"}
"""Words with another form before a vowel."""
VOWELS = tuple("aeéioœu")


def generate_pairs() -> Iterator[Pair]:
    """Yield different sentence pairs without end, always the same."""
    random, seen = Random(0), set()
    while True:
        clauses = [_clause(random) for _ in range(random.choice(CLAUSES))]
        en, fr = clauses[0]
        for next_en, next_fr in clauses[1:]:
            conjunction = random.choice(list(CONJUNCTIONS))
            en, fr = f"{en} {conjunction} {next_en}", f"{fr} {CONJUNCTIONS[conjunction]} {next_fr}"
        pair = _capitalize(en), _capitalize(_join(fr.split()))
        if pair[0] not in seen:
            seen.add(pair[0])
            yield pair


@functools.cache
def toy_pairs() -> dict[str, list[Pair]]:
    """Return the pairs of each split; no source sentence is in two of them."""
    pairs = (pair for pair in generate_pairs() if pair[0] != FIRST_PAIR[0])
    splits = {name: [next(pairs) for _ in range(size)] for name, size in SPLIT_SIZES.items()}
    splits["validation"][0] = FIRST_PAIR
    return splits


def _clause(random: Random) -> Pair:
    """Return subject, verb and object, sometimes negated."""
    subject = random.choice(PRONOUNS) if random.random() < 0.6 else _animate_subject(random)
    verb = random.choice([EAT, *VERBS])
    object_en, clitic, object_fr = _object(random, verb, subject.form)
    english = random.choice(verb.en)
    third_person = subject.form == 2
    negated = random.random() < 0.3
    if negated:
        english = f"{'does' if third_person else 'do'} not {english}"
    elif third_person:
        english += "es" if english.endswith("ch") else "s"
    before, after = ("ne", "pas") if negated else ("", "")
    french = f"{subject.fr} {before} {clitic} {verb.fr[subject.form]} {after} {object_fr}"
    words = f"{subject.en} {english} {verb.particle} {object_en}".split()
    return " ".join(words), french


def _animate_subject(random: Random) -> Subject:
    """Return a noun phrase as a subject."""
    en, fr, plural = _noun_phrase(random, [*ANIMALS, *PEOPLE])
    return Subject(en, fr, 4 if plural else 2)


def _object(random: Random, verb: Verb, subject_form: int) -> tuple[str, str, str]:
    """Return an object: English, and French, which stands before the verb or after it."""
    if verb is EAT:
        en, fr, _ = _noun_phrase(random, FOODS, allow_generic=True)
        return en, "", fr
    if random.random() < 0.25:
        same = next((forms for forms in SAME_PERSON if subject_form in forms), set())
        pronoun = random.choice([p for p in OBJECT_PRONOUNS if p.form not in same])
        return pronoun.en, pronoun.fr, ""
    en, fr, _ = _noun_phrase(random, [*ANIMALS, *PEOPLE, *FOODS, *THINGS], allow_generic=True)
    return en, "", fr


def _noun_phrase(
    random: Random, nouns: list[Noun], *, allow_generic: bool = False
) -> tuple[str, str, bool]:
    """Return a noun with its determiner and adjectives in both languages, and if it is plural.

    Of things in general French needs an article and English has none: cats, les chats.
    """
    noun, plural = random.choice(nouns), random.random() < 0.5
    determiner = random.choice(list(DETERMINERS))
    forms = DETERMINERS[determiner]
    if plural and determiner == "this":
        determiner = "these"
    if plural and determiner == "the" and allow_generic:
        determiner = ""
    en, fr = [determiner], [forms[2] if plural else forms[noun.feminine]]
    after = []
    if random.random() < 0.3:
        size = random.choice(SIZES)
        en.append(random.choice(size.en))
        fr.append(_inflect(size, noun, plural))
    if random.random() < 0.3:
        color = random.choice(COLORS)
        en.append(random.choice(color.en))
        after.append(_inflect(color, noun, plural))
    en.append(noun.en_plural if plural else noun.en)
    fr += [noun.fr_plural if plural else noun.fr, *after]
    return " ".join(en).strip(), " ".join(fr), plural


def _inflect(adjective: Adjective, noun: Noun, plural: bool) -> str:
    return (adjective.fr_feminine if noun.feminine else adjective.fr) + "s" * plural


def _join(words: list[str]) -> str:
    """Join French words; some change before a vowel."""
    text = ""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if following.startswith(VOWELS):
            word = BEFORE_VOWEL.get(word, word)
            if word in ELIDED:
                text += f"{word[:-1]}'"
                continue
        text += f"{word} "
    return text.strip()


def _capitalize(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
