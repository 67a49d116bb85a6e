"""A file of records with something of everything in it: hostile words, Arabic, faults, repeats, what is too long."""

import json

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"
ARABIC = "مرحبا بالعالم! كيف حالك اليوم، وهل وصلت السفينة (رقم 12) إلى الميناء؟"


def chat(*contents, system=None, **more):
    """One record; contents alternate from the user's."""
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages += [{"role": "user" if place % 2 == 0 else "assistant", "content": content} for place, content in enumerate(contents)]
    return json.dumps({"messages": messages, **more}, ensure_ascii=False)


def write(path):
    """16 good records and 3 that cannot be used."""
    lines = [
        chat("What is 7 times 6?", "It is 42.", system="You are brief."),
        chat(f"قل مرحبا من فضلك.\n{ARABIC}", ARABIC),
        chat(f"Say {HOSTILE}", HOSTILE),
        chat("Controls \x1b[31mred\x1b[0m and \u202eturned\u202c text", "Shown as what they are: \u202eabc\u202c \x07 end"),
        chat("", "An answer to nothing."),
        chat("I write <|assistant|> in my text", "and <|end|> in mine"),
        chat("你好,小猫在哪里?", "小猫在桌子上。"),
        chat("Count.", " ".join(map(str, range(900)))),
        chat("the same", "again"),
        chat("the same", "again"),
        "{not json",
        json.dumps({"messages": [{"role": "assistant", "content": "first"}, {"role": "user", "content": HOSTILE}]}),
        json.dumps({"text": HOSTILE, "label": 1}),
        *[chat(f"Question {number}?", f"Answer {number}.", id=number) for number in range(6)],
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
