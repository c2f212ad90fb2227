"""Chat with several policies side by side; thumbs and blind choices become rows for the next round."""

import random
import threading
from collections import defaultdict
from collections.abc import Mapping
from itertools import product
from typing import Any

from rlhf_helpers.core.stats import Estimate, proportion
from rlhf_helpers.lab.comparison import compare_page
from rlhf_helpers.lab.labeling.store import TIE, Item, Label, LabelStore
from rlhf_helpers.lab.widgets import ASSETS, Form, page_script

THUMB = "thumb"  # the task of an item in the store; its label is 1 for up, 0 for down


class SideBySide(Form):
    """Sends each message to several policies and takes a thumb for any answer, or a blind choice of two.

    Each policy remembers its own conversation. In a blind comparison no name is shown, the order of the two
    answers is drawn anew for each message, and both policies continue from the chosen answer. So both always
    answer the same conversation, and each choice is a pair of the preference format.

    The store holds every thumb and choice before the page changes. The page (assets/chat.js) draws `shown`
    and sends {"send": text}, {"thumb": true, "turn": 0, "place": 1}, {"choice": 0, 1 or "tie"} or
    {"restart": true}. `ChatServer(..., form=...)` serves it without Jupyter. Lesson 4.
    """

    _esm = page_script("chat.js")

    def __init__(
        self,
        policies: Mapping[str, Any],
        store: LabelStore,
        *,
        annotator: str = "you",
        blind: bool = False,
        seed: int = 0,
    ) -> None:
        """Start a conversation with each policy.

        Args:
            policies: By name, an `AlignedChatbot` or what has its `answer_batch`.
            store: Where thumbs and choices go. A blind comparison counts this person's choices in it, so give
                each comparison a file of its own.
            annotator: The person's name.
            blind: Compare two policies without their names.
            seed: Of the order of blind answers.

        Raises:
            ValueError: A blind comparison does not have exactly two policies.
        """
        if blind and len(policies) != 2:
            raise ValueError(f"a blind comparison needs exactly two policies, got {list(policies)}")
        self.policies, self.store, self.annotator, self.blind = dict(policies), store, annotator, blind
        self._random, self._lock = random.Random(seed), threading.Lock()
        super().__init__()
        self.restart()
        self.on_msg(lambda _widget, content, _buffers: self.receive(content))

    def restart(self) -> None:
        """Forget the conversation; what was saved stays saved."""
        self.turns: list[dict[str, Any]] = []  # as the page draws them
        self.histories: list[list[dict[str, str]]] = [[] for _ in self.policies]
        self.due = False  # a blind choice
        self._show("")

    def send(self, text: str) -> None:
        """Ask every policy; a message that one of them cannot take is not remembered.

        Raises:
            ValueError: A blind choice is due, or a policy cannot take the message.
        """
        if self.due:
            raise ValueError("Choose the better answer, or a tie, before the next message.")
        talks = [[*history, {"role": "user", "content": text}] for history in self.histories]
        bots = self.policies.values()
        replies = [bot.answer_batch([talk])[0] for bot, talk in zip(bots, talks, strict=True)]
        for talk, reply in zip(talks, replies, strict=True):
            talk.append({"role": "assistant", "content": reply.text})
        self.order = list(range(len(replies)))  # indices of the policies, as their answers stand on the page
        if self.blind:
            self._random.shuffle(self.order)
        names = ["Answer A", "Answer B"] if self.blind else list(self.policies)
        answers = [
            {"label": name, "prompt": replies[policy].prompt, "text": replies[policy].text, "thumb": None}
            for name, policy in zip(names, self.order, strict=True)
        ]
        self.turns.append({"message": text, "answers": answers})
        self.histories, self.due = talks, self.blind
        self._show("")

    def thumb(self, up: bool, place: int, turn: int = -1) -> None:
        """Save a thumb for the answer at a place on the page; it replaces the one given before."""
        answer = self.turns[turn]["answers"][place]
        self.store.add(Label(self.annotator, Item(THUMB, answer["prompt"], (answer["text"],)), (0,), int(up)))
        answer["thumb"] = up
        self._show("Saved.")

    def choose(self, place: int | str) -> None:
        """Save which answer to the last message is better, by its place on the page, or "tie".

        Raises:
            ValueError: No choice is due.
        """
        if not self.due:
            raise ValueError("Send a message first: then choose.")
        prompt = self.turns[-1]["answers"][0]["prompt"]
        texts = tuple(history[-1]["content"] for history in self.histories)
        # Equal answers are a tie, whichever was pressed.
        value = TIE if place == TIE or len(set(texts)) == 1 else self.order[int(place)]
        self.store.add(Label(self.annotator, Item("pair", prompt, texts), tuple(self.order), value))
        better = self.order[0] if value == TIE else value
        self.histories = [self.histories[better]] * 2
        self.due = False
        first, second = self.policies
        self._show(f"Saved. Win rate of {first} over {second}: {self.win_rate()} (95 % interval).")

    def win_rate(self) -> Estimate:
        """Estimate how often the first policy is chosen over the second; a tie counts one half.

        Raises:
            ValueError: Nothing was chosen yet.
        """
        values = [label.value for label in self.store.labels(self.annotator) if label.item.task == "pair"]
        return proportion([0.5 if value == TIE else float(value == 0) for value in values])

    def receive(self, content: Mapping[str, Any]) -> dict[str, Any]:
        """Take a message of the page, from whatever thread, and return what the page then shows."""
        with self._lock:
            try:
                match content:
                    case {"send": str(text)}:
                        self.send(text)
                    case {"thumb": bool(up), "turn": int(turn), "place": int(place)}:
                        self.thumb(up, place, turn)
                    case {"choice": 0 | 1 | "tie" as choice}:
                        self.choose(choice)
                    case {"restart": True}:
                        self.restart()
            except (ValueError, IndexError) as error:
                self._show(str(error))
            return self.shown

    def page(self) -> str:
        """Return the page that a `ChatServer` serves: it loads nothing from elsewhere."""
        text = (ASSETS / "chat_page.html").read_text(encoding="utf8")
        return text.replace("/* styles */", self._css).replace("/* script */", page_script("chat.js"))

    def _show(self, message: str) -> None:
        self.shown = {
            "title": "Which answer is better?" if self.blind else "Chat side by side",
            "turns": self.turns,
            "due": self.due,
            "message": message,
            # The page waits for a change, so the same message twice must be one.
            "update": self.shown.get("update", 0) + 1,
        }

    def __repr__(self) -> str:
        """Name the form by its policies, with no address: a lesson stores the same text in every run."""
        return f"SideBySide: {', '.join(self.policies)}"

    def _static_html(self) -> str:
        """Show the conversation so far as a table."""
        messages = [turn["message"] for turn in self.turns]
        if not messages:
            return f"<p>{self.shown['title']}</p>"
        answers: dict[str, list[str]] = defaultdict(list)
        for turn in self.turns:
            for answer in turn["answers"]:
                answers[answer["label"]].append(answer["text"])
        return compare_page(messages, answers).data


def thumb_rows(store: LabelStore) -> list[dict[str, Any]]:
    """Return all thumbs as rows for KTO: prompt, completion and label (true: up)."""
    return [
        {"prompt": label.item.prompt, "completion": label.item.answers[0], "label": bool(label.value)}
        for label in store.labels()
        if label.item.task == THUMB
    ]


def pair_rows(store: LabelStore) -> list[dict[str, str]]:
    """Return pairs for DPO (prompt, chosen, rejected): thumbs that differ about answers to one conversation.

    Blind choices are pairs of `LabelStore.preferences` already.
    """
    thumbs = thumb_rows(store)
    return [
        {"prompt": up["prompt"], "chosen": up["completion"], "rejected": down["completion"]}
        for up, down in product(thumbs, thumbs)
        if up["prompt"] == down["prompt"] and up["label"] > down["label"]
    ]
