"""Write rooms.json, questions in SQuAD's form about rooms of a house that does not exist; rooms.txt has the texts."""

import json
import random
from pathlib import Path

draw = random.Random(0)
names = ["Blue", "Garden", "Oak", "River", "North", "Stone", "Silver", "Lake", "Cedar", "Harbour", "Summit", "Maple"]
kinds = ["Room", "Hall", "Studio"]
floors = ["ground", "first", "second", "third", "fourth"]
people = ["Mrs Okafor", "Mr Brandt", "Ms Lindqvist", "Dr Rossi", "Mr Tanaka", "Mrs Haddad", "Ms Novak", "Mr Silva"]
data, lines = [], []
for i in range(72):
    room = f"{draw.choice(names)} {draw.choice(kinds)}"
    facts = {
        f"Which floor is the {room} on?": (f"The {room} lies on the ", f"{draw.choice(floors)} floor", "."),
        f"How many people does the {room} hold?": (" It holds ", f"{draw.randrange(10, 300)} people", "."),
        f"Who has the key of the {room}?": (" ", draw.choice(people), " has the key."),
    }
    context, questions = "", []
    for question, (before, answer, after) in facts.items():
        questions.append(
            {
                "id": f"{i}-{len(questions)}",
                "question": question,
                "answers": [{"text": answer, "answer_start": len(context) + len(before)}],
            }
        )
        context += before + answer + after
    data.append({"title": room, "paragraphs": [{"context": context, "qas": questions}]})
    lines.append(context)
Path("rooms.json").write_text(json.dumps({"version": "1.1", "data": data}))
Path("rooms.txt").write_text("\n".join(lines) + "\n")
