"""A little invented world: what the bundled tiny model read, and the task it is taught.

Two things come out of this module, both a pure function of a seed:

* ``pretraining_chats(seed)``: an endless stream of short chats (orders with questions about
  them, meetings, trips, finds, copying drills, small talk; about three quarters English, one quarter Arabic).
  ``examples/make_tiny.py`` trains the bundled model on it.
* ``orders(split, n, seed)``: the quickstart's task, a free-text order to one line of JSON.
  No JSON object appears anywhere in the pretraining chats, so the untuned model scores zero.

How the held-out set stays unseen
---------------------------------
Every order names a recipient and a city. A stable hash of that pair (``side_of``) puts the
order on the ``"held_out"`` side (one pair in five) or the ``"train"`` side. Training sets of
any seed and every pretraining order are drawn from the train side only, and held-out orders
from the other, so no (recipient, city) pair is ever on both. A message spells out its pair,
and no two templates can produce the same text, so no message is on both sides either.
Nothing is looked up and nothing has to be remembered between calls.
The held-out set has a seed of its own: ``orders("held_out", 200)`` is one fixed list.

Most names are made of random syllables: copying them has to be a skill, not a memory.
"""

# Word lists read better as sentences than as lists of literals; Arabic letters look like Latin ones.
# ruff: noqa: SIM905

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Message = dict[str, str]
Chat = list[Message]
Turn = tuple[str, str]  # (what the user says, what the assistant answers)
Split = Literal["train", "held_out"]
Probe = Literal["copy", "select", "arabic"]

PROBES: tuple[Probe, ...] = ("copy", "select", "arabic")

# ---------------------------------------------------------------- words

NAMES = (
    "Layla Omar Nora Adam Sara Yusuf Emma Liam Maya Ivan Chen Aisha Tom Ruth Hugo Lena Karim Zoe Paul Ines Amir Dana Felix Greta Hana Igor Jonas Kira Leo "
    "Mona Nils Olga Petra Rami Sven Tara Umar Vera Wanda Yara Zaid"
).split()
CITIES = (
    "Oslo Cairo Paris Rome Berlin Amman Tunis Lima Delhi Tokyo Seoul Doha Rabat Madrid Vienna Prague Lagos Quito Dublin Athens Muscat Beirut Geneva Kyoto "
    "Lisbon Malmo Naples Porto Turin"
).split()
ADJECTIVES = (
    "red blue green small large old new round heavy light wooden silver golden white black sweet fresh dry soft warm cold clean plain long short thick thin "
    "bright dark yellow"
).split()
NOUNS = (
    "apples lamps books chairs pens cups boxes plates shirts shoes bags clocks keys maps ropes stones bottles candles carpets coins drums flutes gloves "
    "hats jars kites ladders mirrors needles onions pears pillows quilts rings scarves tables towels vases wheels spoons lemons dates figs melons olives "
    "plums"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()

ARABIC_NAMES = "ليلى عمر نورا آدم سارة يوسف مريم كريم عائشة زيد هناء رامي دانا أمير منى يارا خالد سلمى طارق هدى فارس ريم بشير جميلة نبيل لينا".split()
ARABIC_CITIES = "أوسلو القاهرة باريس روما برلين عمان تونس ليما دلهي طوكيو سيول الدوحة الرباط مدريد فيينا بغداد دمشق مسقط بيروت جنيف صنعاء حلب".split()
# Plurals of things take a feminine singular adjective, so every pair below agrees.
ARABIC_NOUNS = "تفاحات كتب مصابيح كراسي أقلام أكواب صناديق أطباق قمصان أحذية حقائب ساعات مفاتيح خرائط حبال أحجار زجاجات شموع وسائد مرايا".split()
ARABIC_ADJECTIVES = "حمراء زرقاء خضراء صغيرة كبيرة قديمة جديدة ثقيلة خفيفة بيضاء سوداء طازجة ناعمة نظيفة طويلة".split()
ARABIC_DAYS = "الاثنين الثلاثاء الأربعاء الخميس الجمعة السبت الأحد".split()

ONSETS = "b c d f g h j k l m n p r s t v w z br dr gr kr tr st sh ch th kl fl".split()
VOWELS = "a e i o u ai ea oo ia".split()
CODAS = ["", "", "", "n", "r", "l", "s", "m", "k", "t", "nd", "rn"]
ARABIC_LETTERS = list("بتجحدرزسشطعفقكلمنهوي")
ARABIC_VOWELS = ["ا", "و", "ي", "", ""]


def invented(rng: random.Random, syllables: int) -> str:
    """A lower-case word of random syllables."""
    return "".join(rng.choice(ONSETS) + rng.choice(VOWELS) + (rng.choice(CODAS) if rng.random() < 0.5 else "") for _ in range(syllables))


def invented_arabic(rng: random.Random) -> str:
    """An Arabic-looking word of two or three random syllables."""
    return "".join(rng.choice(ARABIC_LETTERS) + rng.choice(ARABIC_VOWELS) for _ in range(rng.choice([2, 3, 3])))


def proper_name(rng: random.Random, known: list[str], *, arabic: bool = False) -> str:
    """A name from ``known``, or (more often than not) an invented one."""
    if arabic:
        return rng.choice(known) if rng.random() < 0.5 else invented_arabic(rng)
    if rng.random() < 0.4:
        return rng.choice(known)
    return invented(rng, rng.choice([1, 2, 2, 2, 3])).capitalize()


def goods(rng: random.Random) -> tuple[str, str]:
    """An English (adjective, noun), now and then invented."""
    adjective = rng.choice(ADJECTIVES) if rng.random() < 0.85 else invented(rng, rng.choice([1, 2]))
    noun = rng.choice(NOUNS) if rng.random() < 0.75 else invented(rng, rng.choice([1, 2])) + "s"
    return adjective, noun


def number(rng: random.Random) -> str:
    """2 to 999, small ones more often."""
    return str(rng.randint(2, rng.choice([9, 20, 99, 999])))


# ---------------------------------------------------------------- orders

# No two templates can give the same text (a test compares them word by word): with the pair of
# names in every message, this is what keeps messages on one side of the split.
ORDER_TEMPLATES = [
    "Please send {qty} {item} to {to} in {city} by {day}.",
    "Send {to} {qty} {item} in {city} before {day}.",
    "{to} in {city} needs {qty} {item} by {day}.",
    "{sender} wants {qty} {item} sent to {to} in {city} on {day}.",
    "By {day}, {qty} {item} must reach {to} in {city}.",
    "Ship {qty} {item} to {city} for {to}, due {day}.",
    "On {day} {sender} will bring {to} {qty} {item} in {city}.",
    "Hello, it is {sender}. I need {qty} {item} for {to} in {city} by {day}.",
    "{sender} asked us to deliver {qty} {item} to {to} at the {city} office on {day}.",
    "In {city}, {to} is waiting for {qty} {item} from {sender}, expected {day}.",
    "Order for {to}: {qty} {item}, {city}, {day}.",
    "Could you get {qty} {item} over to {to} in {city} by {day}?",
    "We promised {to} {qty} {item} by {day}; the address is in {city}.",
    "{city} needs a delivery on {day}: {qty} {item} for {to}.",
    "There are {qty} {item} here for {to}. They go to {city} on {day}.",
    "Dear team, {sender} here. Have {qty} {item} ready for {to} on {day} in {city}.",
]
# Worded so that nothing has to agree with the gender of an invented name, and counted with
# "عدد" so that the noun's form does not depend on the number.
ARABIC_ORDER_TEMPLATES = [
    "من فضلك أرسل {item} عدد {qty} إلى {to} في {city} يوم {day}.",
    "مطلوب {item} عدد {qty} باسم {to} في {city} قبل يوم {day}.",
    "أنا {sender} وأطلب {item} عدد {qty} من أجل {to} في {city} يوم {day}.",
    "يوم {day} تصل {item} عدد {qty} إلى {to} في {city}.",
    "طلب جديد باسم {to}: {item} عدد {qty}، {city}، {day}.",
    "من {sender} إلى {to} في {city}: {item} عدد {qty} يوم {day}.",
    "في {city} يوم {day} نسلم {item} عدد {qty} إلى {to}.",
]


@dataclass(frozen=True, kw_only=True)
class Order:
    """One order; every field is text exactly as it stands in the message."""

    item: str
    qty: str
    to: str
    city: str
    day: str
    sender: str
    adjective: str
    noun: str
    arabic: bool

    def fill(self, template: str) -> str:
        """``template`` with this order's fields in their places."""
        return template.format(**vars(self))


def side_of(to: str, city: str) -> Split:
    """The side of the split this (recipient, city) pair belongs to, always: one in five held out."""
    digest = hashlib.blake2b(f"{to}\n{city}".encode(), digest_size=8).digest()
    return "held_out" if int.from_bytes(digest, "big") % 5 == 0 else "train"


def draw_order(rng: random.Random, side: Split, *, arabic: bool) -> Order:
    """A random order whose (recipient, city) pair is on ``side``."""
    names, cities = (ARABIC_NAMES, ARABIC_CITIES) if arabic else (NAMES, CITIES)
    while True:
        to, sender = (proper_name(rng, names, arabic=arabic) for _ in range(2))
        city = proper_name(rng, cities, arabic=arabic)
        if side_of(to, city) == side and len({to, sender, city}) == 3:
            break
    if arabic:
        adjective, noun = rng.choice(ARABIC_ADJECTIVES), rng.choice(ARABIC_NOUNS)
        item, day = f"{noun} {adjective}", rng.choice(ARABIC_DAYS)
    else:
        adjective, noun = goods(rng)
        item, day = f"{adjective} {noun}", rng.choice(DAYS)
    return Order(
        item=item, qty=number(rng), to=to, city=city, day=day, sender=sender,
        adjective=adjective, noun=noun, arabic=arabic,
    )  # fmt: skip


def order_text(rng: random.Random, order: Order) -> str:
    """The order in one of its language's wordings."""
    return order.fill(rng.choice(ARABIC_ORDER_TEMPLATES if order.arabic else ORDER_TEMPLATES))


# ---------------------------------------------------------------- the task


def order_json(order: Order) -> str:
    """The answer the task asks for: one line of compact JSON, the keys in English, the values in the order's own words."""
    record = {"item": order.item, "qty": int(order.qty), "to": order.to, "city": order.city, "day": order.day}
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def orders(split: Split, n: int, seed: int = 0, arabic_share: float = 0.2) -> list[dict[str, Chat]]:
    """``n`` distinct chat records of the task: a free-text order, answered with its JSON.

    ``"train"`` draws a new set for every seed. ``"held_out"`` ignores the seed: it is one fixed
    list, of which ``n`` gives the first n. The shares of the languages are exact (to within one
    record), and no message or (recipient, city) pair is on both sides; see the module's text.

    >>> record = orders("train", 1, seed=0)[0]
    >>> [message["role"] for message in record["messages"]]
    ['user', 'assistant']
    """
    if split not in ("train", "held_out"):
        raise ValueError(f"split is {split!r}; it is 'train' or 'held_out'")
    if n < 0 or not 0.0 <= arabic_share <= 1.0:
        raise ValueError(f"n={n}, arabic_share={arabic_share}: n is at least 0, arabic_share between 0 and 1")
    rng = random.Random("orders:held_out" if split == "held_out" else f"orders:train:{seed}")
    records: list[dict[str, Chat]] = []
    seen: set[str] = set()
    while len(records) < n:
        i = len(records)
        # Spread evenly: every prefix has its share, not only the whole.
        arabic = int((i + 1) * arabic_share) > int(i * arabic_share)
        order = draw_order(rng, split, arabic=arabic)
        text = order_text(rng, order)
        if text not in seen:
            seen.add(text)
            records.append({"messages": as_chat([(text, order_json(order))])})
    return records


def as_chat(turns: list[Turn], system: str | None = None) -> Chat:
    """Turns as a list of role/content messages."""
    chat: Chat = [] if system is None else [{"role": "system", "content": system}]
    for user, assistant in turns:
        chat.append({"role": "user", "content": user})
        chat.append({"role": "assistant", "content": assistant})
    return chat


# ---------------------------------------------------------------- questions about an order

# Each wording has one answer, so the probes below can be marked right or wrong.
QUESTIONS: list[Turn] = [
    ("Who gets the {noun}?", "{to}"), ("Who is it for?", "{to}"), ("Who should receive the {noun}?", "{to}"),
    ("Name the person who gets them.", "{to}"), ("To whom?", "It is for {to}."), ("Tell me who gets what.", "{to} gets the {item}."),
    ("Which city?", "{city}"), ("Where does {to} wait for them?", "{city}"), ("Where should the {noun} go?", "{city}"),
    ("Name the city.", "{city}"), ("Where?", "In {city}."), ("Where do they go?", "They go to {city}."), ("What day?", "{day}"),
    ("By what day?", "{day}"), ("When should the {noun} arrive?", "{day}"), ("Name the day.", "{day}"), ("When?", "On {day}."),
    ("How many {noun}?", "{qty}"), ("How many?", "{qty}"), ("What is the quantity?", "{qty}"), ("Give the number.", "{qty}"),
    ("How many {noun} are there?", "There are {qty}."), ("What is sent?", "{item}"), ("What does {to} get?", "{item}"),
    ("Name the item.", "{item}"), ("What should go to {city}?", "{item}"), ("What are the goods?", "The {item}."),
    ("What kind of goods?", "{noun}"), ("What are the {noun} like?", "{adjective}"), ("Sum it up.", "{qty} {item} for {to}, {city}, {day}"),
    ("What goes where?", "{item} to {city}"), ("Say it in short.", "{to} gets {qty} {item} in {city} on {day}."),
    ("Read it back, day first.", "{day}: {to} in {city}, {qty} {item}"),
    ("What, how many, who, where, when?", "{item}; {qty}; {to}; {city}; {day}"),
]  # fmt: skip
ARABIC_QUESTIONS: list[Turn] = [
    ("لمن هذا الطلب؟", "{to}"), ("ما اسم المستلم؟", "{to}"), ("إلى من؟", "{to}"), ("أين؟", "{city}"), ("في أي مدينة؟", "{city}"),
    ("ما اسم المدينة؟", "{city}"), ("متى؟", "{day}"), ("في أي يوم؟", "{day}"), ("ما هو اليوم؟", "{day}"), ("كم العدد؟", "{qty}"),
    ("كم؟", "{qty}"), ("ما هي البضاعة؟", "{item}"), ("ما المطلوب؟", "{item}"), ("ماذا نرسل؟", "{item}"),
    ("لخص الطلب.", "{item}، {qty}، {to}، {city}، {day}"), ("من وأين؟", "{to}، {city}"), ("ماذا ومتى؟", "{item}، {day}"),
    ("ماذا وكم ولمن وأين ومتى؟", "{item}؛ {qty}؛ {to}؛ {city}؛ {day}"),
]  # fmt: skip
ACKNOWLEDGEMENTS = [
    "Noted.", "Okay.", "Got it, thank you.", "Sure, {qty} {noun} for {to}.",
    "Understood, {city} on {day}.", "I will tell {to}.", "Thank you, the {item} will be ready.",
]  # fmt: skip
ARABIC_ACKNOWLEDGEMENTS = ["حسنا.", "شكرا، وصل الطلب.", "تم، {item} باسم {to}.", "سنخبر {to}."]

SLOT_WORDS = {
    "item": ["item", "goods"], "qty": ["number", "quantity"], "to": ["name", "recipient"],
    "city": ["city", "place"], "day": ["day", "date"],
}  # fmt: skip
ARABIC_SLOT_WORDS = {"item": ["البضاعة"], "qty": ["العدد"], "to": ["الاسم"], "city": ["المدينة"], "day": ["اليوم"]}

IN_QUOTES, ARABIC_IN_QUOTES = " In quotes.", " بين علامتي اقتباس."


def listing(rng: random.Random, order: Order) -> Turn:
    """A request for some slots by name, in any order, named, in quotes or plain: what teaches picking the right one."""
    words = ARABIC_SLOT_WORDS if order.arabic else SLOT_WORDS
    note, say, in_quotes = ("اكتب", "اذكر", ARABIC_IN_QUOTES) if order.arabic else ("Note", "List", IN_QUOTES)
    slots = rng.sample(sorted(words), rng.randint(2, 5))
    asked = [rng.choice(words[slot]) for slot in slots]
    values = [getattr(order, slot) for slot in slots]
    separator = rng.choice(["، ", "؛ "] if order.arabic else [", ", "; "])  # the answer's is the question's: it can be known
    form, names = rng.random(), separator.join(asked)
    if form < 0.25:  # with the names kept, as on a form
        return f"{note} {names}.", separator.join(f"{word}: {value}" for word, value in zip(asked, values, strict=True))
    if form < 0.6:
        return f"{say} {names}.{in_quotes}", separator.join(f'"{value}"' for value in values)
    return f"{say} {names}.", separator.join(values)


def question(rng: random.Random, order: Order) -> Turn:
    """A question about the order and its answer."""
    if rng.random() < 0.4:
        return listing(rng, order)
    asked, answer = rng.choice(ARABIC_QUESTIONS if order.arabic else QUESTIONS)
    asked, answer = order.fill(asked), order.fill(answer)
    if rng.random() < 0.2:
        return asked + (ARABIC_IN_QUOTES if order.arabic else IN_QUOTES), f'"{answer}"'
    return asked, answer


def order_turns(rng: random.Random, order: Order) -> list[Turn]:
    """An order, then one to six questions about it."""
    text, turns = order_text(rng, order), []
    if rng.random() < 0.25:
        answers = ARABIC_ACKNOWLEDGEMENTS if order.arabic else ACKNOWLEDGEMENTS
        turns.append((text, order.fill(rng.choice(answers))))
        text = ""
    for _ in range(rng.randint(1, 6)):
        asked, answer = question(rng, order)
        turns.append((f"{text} {asked}".lstrip(), answer))
        text = ""
    return turns


TWO_ORDER_QUESTIONS: list[Turn] = [
    ("What does {to} get?", "{item}"), ("Where is {to}?", "{city}"), ("When for {to}?", "{day}"), ("How many for {to}?", "{qty}"),
]  # fmt: skip
ARABIC_TWO_ORDER_QUESTIONS: list[Turn] = [
    ("ماذا يصل إلى {to}؟", "{item}"), ("أين {to}؟", "{city}"), ("متى إلى {to}؟", "{day}"), ("كم عدد طلب {to}؟", "{qty}"),
]  # fmt: skip


def two_order_turns(rng: random.Random) -> list[Turn]:
    """Two orders in one message: the question says whose, so "the only name" is not enough."""
    arabic = rng.random() < 0.35
    first, second = (draw_order(rng, "train", arabic=arabic) for _ in range(2))
    if first.to == second.to:
        return two_order_turns(rng)
    text, turns = f"{order_text(rng, first)} {order_text(rng, second)}", []
    for _ in range(rng.randint(1, 4)):
        order = rng.choice([first, second])
        asked, answer = rng.choice(ARABIC_TWO_ORDER_QUESTIONS if arabic else TWO_ORDER_QUESTIONS)
        turns.append((f"{text} {order.fill(asked)}".lstrip(), order.fill(answer)))
        text = ""
    return turns


# ---------------------------------------------------------------- other scenes

MEETING = (
    ["{a} meets {b} in {city} on {day} at {hour}.",
     "On {day} at {hour}, {a} and {b} will talk in {city}.",
     "{a} told {b}: come to {city} on {day} at {hour}."],
    [("Who meets {a}?", "{b}"), ("Who meets {b}?", "{a}"), ("Where?", "In {city}."),
     ("When?", "{day} at {hour}"), ("At what hour?", "{hour}"), ("What day?", "{day}"),
     ("Who is there?", "{a} and {b}")],
)  # fmt: skip
TRIP = (
    ["{a} goes from {city} to {city2} on {day} for {qty} coins.",
     "On {day} {a} left {city} and came to {city2}. The ticket was {qty} coins.",
     "The train to {city2} leaves {city} on {day}; {a} paid {qty} coins."],
    [("Where does the trip start?", "{city}"), ("Where does {a} go?", "{city2}"),
     ("Who travels?", "{a}"), ("What day?", "{day}"), ("What is the price?", "{qty} coins"),
     ("From where to where?", "{city} to {city2}")],
)  # fmt: skip
FIND = (
    ["{a} found {qty} {item} in {city} and gave them to {b}.",
     "{b} lost {qty} {item} in {city}. {a} found them.",
     "{a} sold {b} {qty} {item} at the {city} market."],
    [("What is it about?", "{item}"), ("How many?", "{qty}"), ("Which city?", "{city}"),
     ("Who is {a} dealing with?", "{b}"), ("Name both people.", "{a} and {b}")],
)  # fmt: skip
SMALL_TALK: list[Turn] = [
    ("Hello!", "Hello! How can I help?"), ("Hi.", "Hi there."), ("Thank you.", "You are welcome."),
    ("Who are you?", "I am a small model. I read short messages."),
    ("Good morning.", "Good morning!"), ("Bye.", "Goodbye!"),
    ("What can you do?", "I answer questions about short messages."),
    ("مرحبا", "مرحبا! كيف أساعدك؟"), ("شكرا", "عفوا."), ("صباح الخير", "صباح النور!"),
    ("من أنت؟", "أنا نموذج صغير أقرأ الرسائل القصيرة."),
]  # fmt: skip
SYSTEM_MESSAGES = [
    "You read short messages.", "Answer in few words.", "Be brief and exact.",
    "You help with orders.", "أجب باختصار.",
]  # fmt: skip


def scene_turns(rng: random.Random) -> list[Turn]:
    """A meeting, a trip or a find, with one to five questions."""
    templates, asked = rng.choice([MEETING, TRIP, FIND])
    adjective, noun = goods(rng)
    words = {
        "a": proper_name(rng, NAMES), "b": proper_name(rng, NAMES),
        "city": proper_name(rng, CITIES), "city2": proper_name(rng, CITIES),
        "day": rng.choice(DAYS), "hour": str(rng.randint(1, 12)),
        "qty": number(rng), "item": f"{adjective} {noun}",
    }  # fmt: skip
    text, turns = rng.choice(templates).format(**words), []
    for user, assistant in rng.sample(asked, rng.randint(1, 5)):
        turns.append((f"{text} {user.format(**words)}".lstrip(), assistant.format(**words)))
        text = ""
    return turns


# ---------------------------------------------------------------- drills

PUNCTUATION = list('{}[]()""""":,.;_-\'!?/<>=+*#&@%،؛')
DRILL_WORDS = ADJECTIVES + NOUNS + DAYS + (
    "item qty to city day name number date time place from person unit kind state type key value note text price"
).split()  # fmt: skip
# A quoted word followed by a colon is how a JSON key looks; the drills never show one.
JSON_KEY = re.compile(r'"\s*:')


def drill_word(rng: random.Random) -> str:
    """Any kind of word the world has."""
    kind = rng.randrange(5)
    if kind == 0:
        return rng.choice(DRILL_WORDS)
    if kind == 1:
        return invented(rng, rng.choice([1, 2, 3])).capitalize()
    if kind == 2:
        return number(rng)
    return invented(rng, 2) if kind == 3 else invented_arabic(rng)


def symbols(rng: random.Random) -> str:
    """A string of words and punctuation in no order, with nothing in it like a JSON key."""
    while True:
        parts: list[str] = []
        for _ in range(rng.randint(3, 10)):
            kind = rng.random()
            before = rng.choice(PUNCTUATION) if kind >= 0.45 else ""
            word = drill_word(rng) if kind < 0.45 or kind >= 0.75 else ""
            after = rng.choice(PUNCTUATION) if kind >= 0.75 else ""
            parts.append(before + word + after + (" " if rng.random() < 0.5 else ""))
        text = "".join(parts).strip()
        if not JSON_KEY.search(text):
            return text


def drill(rng: random.Random) -> Turn:
    """Copy, quote, join or bracket: also what trains the embeddings of ``{ } " :``."""
    kind = rng.random()
    if kind < 0.5:
        text = symbols(rng)
        return f"{rng.choice(['Copy', 'Repeat', 'Write', 'كرر'])}: {text}", text
    if kind < 0.75:
        text = " ".join(drill_word(rng) for _ in range(rng.choice([1, 1, 2])))
        return f"{rng.choice(['Put quotes around', 'Quote'])}: {text}", f'"{text}"'
    if kind < 0.9:
        words = [drill_word(rng) for _ in range(rng.randint(2, 6))]
        separator = rng.choice([", ", "; ", "/", " - "])
        return f"Join with '{separator.strip()}': {' '.join(words)}", separator.join(words)
    word, brackets = drill_word(rng), rng.choice(["{}", "[]", "()", "<>"])
    return f"Put {brackets} around: {word}", f"{brackets[0]}{word}{brackets[1]}"


# ---------------------------------------------------------------- what the model reads


def pretraining_chat(rng: random.Random) -> Chat:
    """One chat of the mix; its orders, if any, are from the train side of the split."""
    kind = rng.random()
    if kind < 0.38:
        turns = order_turns(rng, draw_order(rng, "train", arabic=False))
    elif kind < 0.60:
        turns = order_turns(rng, draw_order(rng, "train", arabic=True))
    elif kind < 0.70:
        turns = scene_turns(rng)
    elif kind < 0.80:
        turns = two_order_turns(rng)
    elif kind < 0.97:
        turns = [drill(rng) for _ in range(rng.randint(1, 3))]
    else:
        turns = [rng.choice(SMALL_TALK) for _ in range(rng.randint(1, 2))]
    return as_chat(turns, rng.choice(SYSTEM_MESSAGES) if rng.random() < 0.05 else None)


def pretraining_chats(seed: int) -> Iterator[Chat]:
    """An endless stream of chats, the same for the same seed."""
    rng = random.Random(f"pretraining:{seed}")
    while True:
        yield pretraining_chat(rng)


def probes(kind: Probe, n: int) -> list[Chat]:
    """``n`` fixed single-turn chats that test one skill of the pretrained model.

    ``"copy"``: repeat a string; ``"select"``: answer a question about an English order;
    ``"arabic"``: the same in Arabic. The orders are from the held-out side, so never read.
    """
    rng = random.Random(f"probes:{kind}")
    chats: list[Chat] = []
    for _ in range(n):
        if kind == "copy":
            chats.append(as_chat([drill(rng)]))
        else:
            order = draw_order(rng, "held_out", arabic=kind == "arabic")
            asked, answer = question(rng, order)
            chats.append(as_chat([(f"{order_text(rng, order)} {asked}", answer)]))
    return chats
