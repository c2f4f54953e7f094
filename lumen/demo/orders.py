"""What can be ordered at Café Lumen, and what an order is: the facts behind a sentence and behind a line of JSON."""

import json
import random
import zlib
from dataclasses import asdict, dataclass

MILKS = ("oat milk", "soy milk", "almond milk", "coconut milk")
SYRUPS = ("vanilla", "caramel", "hazelnut")
MENU = {  # what there is, and what may be added to it
    "espresso": ("sugar", "cinnamon"),
    "americano": ("sugar", "cinnamon", *MILKS[:2]),
    "latte": MILKS + SYRUPS,
    "cappuccino": (*MILKS, "cinnamon", "cocoa"),
    "flat white": MILKS,
    "cortado": MILKS[:2] + SYRUPS[:2],
    "mocha": (*MILKS, "whipped cream"),
    "hot chocolate": (*MILKS, "whipped cream", "marshmallows", "cinnamon"),
    "chai latte": (*MILKS, "honey", "ginger"),
    "matcha latte": (*MILKS, "honey", "vanilla"),
    "iced coffee": MILKS[:2] + SYRUPS,
    "green tea": ("honey", "lemon", "ginger", "mint"),
    "black tea": ("honey", "lemon", "sugar"),
    "mint tea": ("honey", "lemon", "ginger"),
    "iced tea": ("lemon", "peach", "mint"),
    "lemonade": ("mint", "ginger", "ice"),
}
ITEMS = tuple(MENU)
SIZES = ("small", "medium", "large")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COUNTS = (1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6, 7, 8, 9)  # small orders are commoner


@dataclass(frozen=True, kw_only=True)
class Order:
    """What one guest wants; the fields stand in the order in which the JSON answer writes them."""

    name: str
    item: str  # a key of MENU
    size: str  # one of SIZES
    count: int  # 1 to 9
    extra: str | None  # one of MENU[item], or nothing

    @property
    def noun(self) -> str:
        """The item in the singular or plural: `lattes`."""
        return self.item if self.count == 1 else f"{self.item}s"

    def as_words(self) -> str:
        """The order as the barista repeats it: `two large lattes with oat milk`."""
        extra = f" with {self.extra}" if self.extra else ""
        return f"{NUMBERS[self.count]} {self.size} {self.noun}{extra}"

    def as_json(self) -> str:
        """The answer that fine-tuning teaches: all five fields."""
        return as_json(asdict(self))


def as_json(record: dict) -> str:
    """One line of JSON without blanks."""
    return json.dumps(record, ensure_ascii=False, separators=(",", ":"))


def is_reserved(order: Order) -> bool:
    """Whether this combination, whoever orders it, is kept for the examination: by its checksum, every fifth one is."""
    return zlib.crc32(order.as_words().encode()) % 5 == 0


def random_order(rng: random.Random, name: str, *, reserved: bool = False) -> Order:
    """An order from the menu for `name`, among the reserved combinations or among all others."""
    while True:
        item = rng.choice(ITEMS)
        extra = rng.choice(MENU[item]) if rng.random() < 0.55 else None
        order = Order(name=name, item=item, size=rng.choice(SIZES), count=rng.choice(COUNTS), extra=extra)
        if is_reserved(order) == reserved:
            return order


def same_order(answer: str, wanted: str) -> bool:
    """Whether `answer` is JSON of the same value as the JSON `wanted`: how the demo counts a success."""
    try:
        return json.loads(answer) == json.loads(wanted)
    except json.JSONDecodeError:
        return False
