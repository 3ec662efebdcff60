"""SLAKE's Chinese questions about training images, as its English ones would put them.

    pairs = translate(question, answer)                   # every English wording of it with the answer; empty where it is not known
    python -m bench.demo_chinese ../shared/data/slake     # how many are known, and how often they agree with the English answers

SLAKE asks about an image in two languages, and not the same: of one X-ray the English rows ask whether there is pneumonia on the lower
right lung, the Chinese ones whether there is on the upper right. The two languages divide the images differently, so rows about an
image that no English training row names are left out. Wordings are those of the English training split, words lie in
demo_chinese_words.py. Knows no model.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from bench.demo_chinese_words import (
    COLOURS,
    DISEASES,
    MANY,
    MODALITIES,
    ORGANS,
    PARTS,
    PLACES,
    PLANES,
    POLAR,
    SENTENCES,
    SHAPES,
    SYSTEMS,
    USES,
)
from bench.demo_facts import Pair
from edgemed.data import load_named, parse_dataset
from edgemed.data.rows import read_rows


def _titled(words: Mapping[str, str]) -> Callable[[str], str | None]:
    """Reads a list of such words; None where one of them is not known."""

    def read(answer: str) -> str | None:
        found = [words.get(part.strip()) for part in re.split("[,、]|和(?=[\u4e00-\u9fff])", answer)]
        return ", ".join(word if word[:1].isupper() else word.title() for word in found if word) if all(found) else None

    return read


_polar = _titled(POLAR)
_organs = _titled(ORGANS)
_places = _titled(PLACES)
_diseases = _titled({**DISEASES, "无": "none", "没有": "none", "不存在": "none"})
_modality = _titled(MODALITIES)
_colour = _titled(COLOURS)
_side = _titled({"左侧": "left", "右侧": "right", "左叶": "left", "右叶": "right", "双侧": "both", "都是": "both"})


def _number(answer: str) -> str | None:
    return answer if answer.isdigit() else None


class _Form(NamedTuple):
    """A Chinese form with named groups, its English wordings, those that ask the opposite, and what reads the answer."""

    pattern: re.Pattern[str]
    read: Callable[[str], str | None]
    english: tuple[str, ...]
    opposite: tuple[str, ...] = ()


def _form(pattern: str, read: Callable[[str], str | None], *english: str, opposite: tuple[str, ...] = ()) -> _Form:
    return _Form(re.compile(pattern), read, english, opposite)


# Group o… is an organ, d a disease, p a place, c a colour, b a part of the body, m a modality, n a plane, s a system, u a use.
_GROUPS = {
    "o": ORGANS,
    "d": DISEASES,
    "p": PLACES,
    "c": COLOURS,
    "b": PARTS,
    "m": MODALITIES,
    "n": PLANES,
    "s": SYSTEMS,
    "u": USES,
}


def _one_of(group: str) -> str:
    return f"(?P<{group}>{'|'.join(sorted(_GROUPS[group[0]], key=len, reverse=True))})"


_O, _O2, _O3, _P, _D, _D2, _C = map(_one_of, ("o", "o2", "o3", "p", "d", "d2", "c"))
_IN = r"(?:在?这[张个幅]?(?:图片|图像|图|照片)(?:里|中|上)?|在?此?图[片像]?(?:里|中)?|该?图像)?"
_NORMAL = ("Does this image look normal?", "Is this image normal?")
_ABNORMAL = ("Are there abnormalities in this image?", "Does this image look abnormal?")
_WELL = ("Is the {o} healthy?", "Does the {o} look normal?")
_ILL = ("Is the {o} abnormal?", "Does the {o} look abnormal?")
FORMS = (
    _form(
        r"这*张(?:图片|照片)的成像方式是什么\?|用什么样的成像方式拍摄这张照片\?|这张照片是怎么拍的\?|"
        r"什么样的成像方式被这张图片使用\?|这张图像显示的是哪种类型的成像.*|这是什么类型的医学图像\?",
        _modality,
        "What modality is used to take this image?",
        "What modality is shown in this image?",
        "How was this image taken?",
        "What imaging modality was used?",
    ),
    _form(
        r"这是(?P<m>CT|X光|核磁共振)(?:图像|扫描|成像)?吗\?|这张图片的拍摄是通过(?P<m2>CT|X光|核磁共振)吗\?",
        _polar,
        "Is this image taken via {m}?",
    ),
    _form(
        r".*(?:加权方式|核磁共振的哪种类型|T1加权还是T2加权|t1还是t2).*",
        _titled({"T1": "T1", "T2": "T2"}),
        "What is the mr weighting in this image?",
        "What type of MRI is shown in this image?",
        "Is this a T1 weighted or T2 weighted MRI image?",
        "Which kind of weighting is this image generated with, t1 or t2?",
    ),
    _form(r"这是(?P<t>T[12])加权的核磁共振图像吗\?", _polar, "Is this an MRI image with {t} weighted?"),
    _form(
        r"图像里包含的区域属于身体哪个部分\?|这个图像属于身体的哪个部位\?",
        _titled(PARTS),
        "Which part of the body does this image belong to?",
    ),
    _form(
        r"图中的器官位于身体的哪个部分\?|从整个身体的角度看.*",
        _titled(PARTS),
        "Which part of the human body is the organ located in the image?",
        "Which part do the organs in this image locate from the aspect of the whole body?",
    ),
    _form(
        r"图像展示的位置是\?|图像在身体里代表什么\?",
        _titled(PARTS),
        "Where does the picture show?",
        "Where does the image represent in the body?",
    ),
    _form(
        r"图像中的主要器官系统是什么\?|图中是什么器官系统\?",
        _titled(PARTS),
        "Which organ system is imaged?",
        "What organ system is pictured?",
        "What organ system is primarily present in this image?",
        "What is the organ system visualized?",
    ),
    _form(r"图像中的器官是否存在于(?P<b>.+)\?", _polar, "Do the organs in the image exist in the {b}?"),
    _form(r"这张图像是关于(?P<b>.+?)[吗么]\?", _polar, "Is this a study of the {b}?"),
    _form(
        r"这个图像的扫描平面是什么\?|这个图像属于哪一个扫描平面\?|这个图像是在哪个平面扫描的\?|扫描的是图像的哪个平面.*",
        _titled(PLANES),
        "What is the scanning plane of this image?",
        "In what plane is this image scanned?",
        "What scanning plane does this image belong to?",
        "Which plane is the image scanned, transverse plane or coronal plane?",
    ),
    _form(r"这是(?P<n>..面)吗\?", _polar, "Is this a {n}?"),
    _form(r"图片中包[含括]哪些(?:疾病|异常)\?", _diseases, "What diseases are included in the picture?"),
    _form(
        r"异常病变在哪个位置\?|图中异常位置在哪里\?",
        _places,
        "Where is/are the abnormality located?",
        "Where is the abnormality in this image?",
    ),
    _form(
        rf"{_IN}(?:是否)?(?:包[含括]|有|存在){_O}吗?\?|"
        rf"{_O2}(?:出现在|是否存在于|在){_IN}(?:中|上)?(?:了|出现了)?吗?\?",
        _polar,
        "Does the picture contain {o}?",
        "Does the {o} appear in this image?",
        "Is there {o} in this image?",
    ),
    _form(r"图片?中(?:体积)?最大的器官是什么\?", _organs, "What is the largest organ in the picture?"),
    _form(r"图片主要器官是什么\?|图像中的主要器官是什么\?", _organs, "What is the main organ in the image?"),
    _form(rf"(?:图中)?{_O}(?:是异常的|看起来不正常|不正常|是否存在异常|是不健康的)吗?\?", _polar, *_ILL, opposite=_WELL),
    _form(rf"{_O}(?:是健康的|是正常的|是否正常)吗?\?", _polar, *_WELL, opposite=_ILL),
    _form(
        r"(?:这张)?图片(?:看起来|是)(?:是否)?正常(?:的)?吗?\?|这张图片看起来是否正常\?|这张图片是正常的吗\?",
        _polar,
        *_NORMAL,
        opposite=_ABNORMAL,
    ),
    _form(
        r"图中存在异常吗\?|病人有任何的异常吗\?|这个图像有异常吗\?|这张图片看起来不正常吗\?|图片里是否存在异常\?",
        _polar,
        *_ABNORMAL,
        opposite=_NORMAL,
    ),
    _form(
        rf"{_IN}(?:有|存在|显示了)(?:多少)+[个颗只]?{_O}\?",
        _number,
        "How many {os} in this image?",
        "How many {os} are shown in this image?",
    ),
    _form(r"图片?中有多少个器官\?", _number, "How many organs are there in this image?"),
    _form(r"该图像中有多少种异常\?", _number, "How many kinds of abnormalities are there in this image?"),
    _form(
        r"拍这样的图像会对身体造成多大的伤害\?",
        _titled({"较少": "a little", "较多": "much", "没有": "none"}),
        "How much damage will be caused to the body taking such an image?",
    ),
    _form(
        r"图像中身体顶部的器官是什么\?|什么器官(?:位于图像的|在图像)顶部\?|图像顶部是什么器官\?",
        _organs,
        "What is the organ on the top of the body in this image?",
    ),
    _form(r"(?:位于图片最右侧的|图像中最右侧)器官是什么\?", _organs, "What is the rightmost organ in this image?"),
    _form(r"图像中?最左侧(?:的是什么器官|器官是什么)\?", _organs, "What is the leftmost organ in this image?"),
    _form(r"图片(?P<p>[左右]侧)的是什么器官\?", _organs, "What is the organ on the {p} side of this image?"),
    _form(r"位于图片右下角的是什么器官\?", _organs, "What is the organ located in the lower right corner?"),
    _form(r"哪个器官位于图像的底部\?|什么器官在图像底部\?", _organs, "Which organ is located at the bottom of this image?"),
    _form(rf"图像{_P}的{_C}部分是什么器官\?", _organs, "What organ is the {c} part on the {p} of the image?"),
    _form(r"图像中?黑色部分是什么器官\?", _organs, "What organ is the black part of the image?"),
    _form(r"(?:图中)?右上角的黑色空洞是什么器官\?", _organs, "What organ is the black hollow in the upper right corner?"),
    _form(
        rf"(?:图中)?{_O}(?:在哪|在哪里|在哪个位置|位于哪个位置)\?",
        _places,
        "Where is the {o}?",
        "Where is the {o} in this image?",
    ),
    _form(
        rf"(?:图中)?{_D}(?:在哪|在哪里|位于图?中?(?:肺|胸腔|身体)?的?(?:哪个部位|哪里))\?",
        _places,
        "Where is/are the {d} located?",
        "Where is the {d} in this image?",
    ),
    _form(
        rf"(?:图中|在这个图像中){_O}和{_O2}哪个(?:体积)?更大\?",
        _organs,
        "Which is bigger in this image, {o} or {o2}?",
    ),
    _form(
        rf"(?:图中|在这个图像中){_O}和{_O2}哪个(?:体积)?更小\?",
        _organs,
        "Which is smaller in this image, {o} or {o2}?",
    ),
    _form(
        rf"图中{_O}、{_O2}和{_O3}哪个(?:体积)?(?:更|最)大\?",
        _organs,
        "Which is the biggest in this image, {o}, {o2} or {o3}?",
    ),
    _form(
        r"肺或者心脏哪个是异常的\?|图中哪个器官是不正常的\?|图中心脏和肺部哪个是异常的\?",
        _titled({**ORGANS, "都是": "both"}),
        "Which organ is abnormal, heart or lung?",
    ),
    _form(
        r"图片中哪个器官属于(?P<s>.+)\?",
        _organs,
        "Which organs/organ in the picture belong to the {s}?",
        "Which organs/organ is part of the {s} in this image?",
    ),
    _form(r"图片中有属于(?P<s>.+系统)的器官吗\?", _polar, "Do any of the organs in the picture belong to the {s}?"),
    _form(
        r"图片中包含器官可以(?:被)?用于(?P<u>.+)吗?\?|图片中包含(?:可以|有)(?P<u2>.+)的器官吗\?+|图中有没有器官可以被用于(?P<u3>.+)\?",
        _polar,
        "Does the picture contain the organ that could be used for {u}?",
        "Does the picture contain the organ which has the effect of {u}?",
    ),
    _form(r"图中哪个器官成对出现\?", _organs, "Which organs appear in pairs?"),
    _form(
        rf"(?:图(?:片)?中的?)?{_O}(?:的颜色是什么|是什么颜色的?|(?:在(?:图片|照片)中)?显示什么颜色)\?",
        _colour,
        "What color is the {o} in the picture?",
        "What color does the {o} show in the picture?",
    ),
    _form(r"病人的(?P<p>[左右]肺)有异常吗\?", _polar, "Is/Are there abnormalities in the patient's {p}?"),
    _form(r"患者的(?P<p>[左右])脑叶是否异常\?", _polar, "Is/Are there abnormalities in the patient's {p} brain lobe?"),
    _form(r"图中[肺脑]哪一?个叶是正常的\?", _side, "Which lobe is normal in this image?"),
    _form(r"图中肺哪一?个叶是异常的\?|图中哪侧的脑叶是异常的.*", _side, "Which lobe is abnormal in this image?"),
    _form(r"图中肺哪一侧是异常的.*", _side, "Which side of lung is abnormal in this image?"),
    _form(r"图中哪侧的脑半球是异常的.*", _side, "Which hemisphere is abnormal,left or right?"),
    _form(rf"在这张图片中,(?P<p>[左右][上下]?肺)可以观察到吗?{_D}吗?\?", _polar, "Can {d} be observed on the {p} in this picture?"),
    _form(rf"在这张图片中,?可以观察到{_D}吗\?|图片中可以观察到{_D2}吗\?", _polar, "Can {d} be observed in this picture?"),
    _form(rf"图中脑部{_P}显示什么疾病\?", _diseases, "What disease is/are shown on the {p} of brain?"),
    _form(rf"(?:图中)?肺的{_P}是什么病\?", _diseases, "What disease is/are shown on the {p} of lung?"),
    _form(rf"图中(?:病人)?(?:是否有|患有){_D}吗?\?", _polar, "Does the patient have {d}?"),
    _form(r"图中肿瘤是增强性的吗\?", _polar, "Is the tumor enhancing?"),
    _form(
        r"图中异常是(?:什么密度|高密度还是低密度)\?",
        _titled({"高密度": "hyperdense", "低密度": "hypodense"}),
        "Is the abnormality hyperdense or hypodense?",
    ),
    _form(rf"相对于其他组织,{_D}是白色的还是灰色的\?", _colour, "Is {d} white or gray relative to other tissues?"),
    _form(r"该图像中的异常是什么颜色\?", _colour, "What is the color of abnormality in this image?"),
    _form(
        rf"(?:图中|这张图片中|此图像中|该图像中|图片中|这个病人的)的?{_O}的?(?:形状是什么|是什么形状的?)\?",
        _titled(SHAPES),
        "What is the shape of {o} in this image?",
    ),
    _form(
        rf"如何治疗位于图中[肺胸]部{_P}的疾病\?",
        SENTENCES.get,
        "How to treat the disease located on the {p} of lung in this image?",
    ),
    _form(rf"如何治疗这张图片中脑{_P}的疾病\?", SENTENCES.get, "How to treat the disease on the {p} of brain in this image?"),
    _form(
        r"如何预防肺部(?P<p>.+?)[侧叶]病变的发生\?",
        SENTENCES.get,
        "How to prevent the occurrence of the disease on the {p} lobe of lung in this image?",
    ),
    _form(
        r"如何预防图片中大脑(?P<p>.+?)叶疾病的发生\?",
        SENTENCES.get,
        "How to prevent the occurrence of the disease on the {p} lobe of brain in this image?",
    ),
    _form(
        r"图中(?P<p>[左右][上下]?)肺的疾病会给病人带来什么样的症状\?",
        SENTENCES.get,
        "What kind of symptoms will the disease on the {p} of lung bring to the patient?",
    ),
    _form(
        r"图中心脏.*的疾病会给病人带来什么样的症状\?",
        SENTENCES.get,
        "What kind of symptoms will the disease on the heart bring to the patient?",
    ),
    _form(
        r"图片中大脑(?P<p>.+?)侧的疾病会给患者带来什么样的症状\?",
        SENTENCES.get,
        "What kind of symptoms will the disease on the {p} lobe of brain in the picture bring to the patient?",
    ),
    _form(
        r"产生图中大脑(?P<p>.+?)侧疾病的主要病因是什么\?",
        SENTENCES.get,
        "What is the main cause of the disease on the {p} lobe of brain in this picture?",
    ),
    _form(
        rf"图中肺部{_P}(?:病变)?的主要病因是什么\?",
        SENTENCES.get,
        "What is the main cause of the disease on the {p} of the lung in the picture?",
    ),
    _form(
        r"这张照片中的?主要的?器官的功能是什么\?",
        SENTENCES.get,
        "What is the function of the main organ in this picture?",
        "What is the effect of the main organ in this picture?",
    ),
    _form(r"这张图片中黑色的器官可以被用来做什么\?", SENTENCES.get, "What can the organ with black color in this image be used for?"),
    _form(r"这张图片中心的器官可以被用来做什么\?", SENTENCES.get, "What is the effect of the center organ in this picture?"),
    _form(
        r"(?:这个图像(?:上方|顶部)|位于图像顶部)的器官的功能是什么\?",
        SENTENCES.get,
        "What is the function of the organ on the top of this image?",
    ),
    _form(r"位于图像底部的器官的功能是什么\?", SENTENCES.get, "What is the function of the organ on the bottom of this picture?"),
    _form(r"这张图像中最左边的器官的功能是什么\?", SENTENCES.get, "What is the effect of the leftmost organ in this picture?"),
    _form(r"这张图片左边的灰色器官有什么作用\?", SENTENCES.get, "What is the effect of the gray organ on the left of this picture?"),
    _form(r"图中成对出现的器官的功能是什么\?", SENTENCES.get, "What is the function of the organs appearing in pairs in the picture?"),
)


def translate(question: str, answer: str) -> list[Pair]:
    """Every English wording with its answer; empty where a form, a word or the answer is not known."""
    question, answer = (text.strip().replace("，", ",").replace("？", "?").replace(", ", ",") for text in (question, answer))
    for form in FORMS:
        found = form.pattern.fullmatch(question)
        if not found:
            continue
        words = _words(found.groupdict())
        told = form.read(answer)
        if words is None or not told:
            return []
        opposite = {"Yes": "No", "No": "Yes"}.get(told)
        pairs = [(english.format(**words), told) for english in form.english]
        return pairs + [(english.format(**words), opposite) for english in form.opposite if opposite]
    return []


def _words(groups: Mapping[str, str | None]) -> dict[str, str] | None:
    """English for what a form's groups hold; a group that stands in one of two places has a number in the other."""
    words: dict[str, str] = {}
    for name, text in groups.items():
        if text is None:
            continue
        english = text if name == "t" else _GROUPS[name[0]].get(text)
        if english is None:
            return None
        words[name] = english
        words.setdefault(name[0], english)
    if "o" in words:
        words["os"] = MANY.get(words["o"], words["o"])
    return words


def translated(folder: Path, images: Iterable[Path]) -> Iterator[tuple[Path, list[Pair]]]:
    """Of each Chinese row about one of these images, whichever split it is in, the image and `translate`'s pairs."""
    wanted = set(images)
    for name in ("train.json", "validate.json"):
        for row in read_rows(folder / name):
            image = folder / "imgs" / str(row["img_name"])
            if row["q_lang"] == "zh" and image in wanted:
                yield image, translate(str(row["question"]), str(row["answer"]))


if __name__ == "__main__":
    slake = Path(sys.argv[1])
    given: dict[Path, dict[str, str]] = {}
    for sample in load_named(parse_dataset(f"slake={slake}", "train")):
        if sample.image:
            given.setdefault(sample.image, {})[sample.question.lower().strip()] = sample.answer.lower().strip().replace("  ", " ")
    counts: Counter[str] = Counter()
    wrong: Counter[tuple[str, str, str]] = Counter()
    rows = list(translated(slake, given))
    for image, pairs in rows:
        asked = [(q, a) for q, a in pairs if q.lower() in given[image]]
        counts["not known" if not pairs else "asked in English, too" if asked else "in words that no English row has"] += 1
        for q, a in asked:
            same = a.lower() == given[image][q.lower()]
            counts["… and the same" if same else "… and another answer"] += 1
            if not same:
                wrong[q, a, given[image][q.lower()]] += 1
    print(len(rows), "rows about", len({image for image, _ in rows}), "images:", dict(counts))
    for (q, a, b), count in wrong.most_common(int(sys.argv[2]) if len(sys.argv) > 2 else 0):
        print(f"{count:4}  {q}  {a} / {b}")
