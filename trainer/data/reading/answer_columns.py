"""Which columns hold the better and the worse answer, a label or a margin, by their headers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from trainer.data.reading.columns import fold_header

# Our column -> words that say which answer, or what of it, a header means.
CHOSEN = (
    *("chosen", "preferred", "positive", "pos", "accepted", "accept", "good", "better", "winner"),
    *(
        "win",
        "winning",
        "好",
        "較好",
        "较好",
        "較佳",
        "较佳",
        "佳",
        "優",
        "优",
        "正",
        "偏好",
        "採用",
    ),
    *("采用", "接受", "喜歡", "喜欢", "選中", "选中", "勝", "胜"),
)
REJECTED = (
    *("rejected", "reject", "dispreferred", "nonpreferred", "negative", "neg", "bad", "worse"),
    *(
        "loser",
        "lose",
        "losing",
        "壞",
        "坏",
        "不好",
        "較差",
        "较差",
        "差",
        "劣",
        "負",
        "负",
        "拒絕",
    ),
    *("拒绝", "淘汰", "不採用", "不采用", "不喜歡", "不喜欢", "未選中", "未选中", "敗", "败"),
)
LABELS = ("label", "labels", "ktotag", "desirable", "標籤", "标签", "標記", "标记", "是否良好")
MARGINS = ("margin", "margins", "差距", "分差")
NOUNS = (
    r"messages?|response|answer|output|completion|reply|conversations?|text|"
    r"回答|答案|答覆|回覆|回复|答复|回應|回应|輸出|输出|樣本|样本|例"
)
SCORES = r"scores?|ratings?|rewards?|評分|评分|分數|分数|得分"
ANSWER_NAMES = ("chosen", "rejected", "label", "margin", "chosen_score", "rejected_score")


def guess_answers(headers: Iterable[str], named: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return our names of answer columns with the headers that mean them.

    Both answers are there, or neither; both scores, or neither; a margin beside answers only, a
    label beside none.

    Args:
        headers: to guess from, other than the named ones.
        named: what is known already, by our names; goes over the guess.
    """
    found: dict[str, str] = {}
    for header in headers:
        bracketed = re.sub(r"[()\[\]【】（）]", " ", header)  # as in "response (chosen)"
        name = _meaning(fold_header(bracketed)) or _meaning(fold_header(header))
        if name:
            found.setdefault(name, header)
    found = {name: header for name, header in {**found, **(named or {})}.items() if header}
    for pair in (("chosen", "rejected"), ("chosen_score", "rejected_score")):
        if not set(pair) <= set(found):
            found = {name: header for name, header in found.items() if name not in pair}
    if "chosen" in found:
        found.pop("label", None)
        return found
    return {name: header for name, header in found.items() if name == "label"}


def _meaning(folded: str) -> str | None:
    if folded in LABELS:
        return "label"
    if folded in MARGINS:
        return "margin"
    for pattern, suffix in ((NOUNS, ""), (SCORES, "_score")):
        words = {
            folded,
            re.sub(rf"的?({pattern})$", "", folded),
            re.sub(rf"^({pattern})", "", folded),
        }
        if suffix:
            words.remove(folded)
            words = {re.sub(rf"的?({NOUNS})$", "", word) for word in words}
        for name, known in (("chosen", CHOSEN), ("rejected", REJECTED)):
            if words & set(known):
                return name + suffix
    return None
