"""Every option and argument of the command line, defined once, so that one word means one thing everywhere.

Paths are plain: a path that does not exist is an error of ours (exit 1), not a usage error of the parser (exit 2).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from edgemed.core.errors import InputError


def path_option(name: str, *, help: str, metavar: str) -> Any:
    """An option that is a path."""
    return typer.Option(name, help=help, metavar=metavar, parser=_path_parser(name, Path))


def path_argument(*, help: str, metavar: str, kind: type[str] | type[Path] = Path) -> Any:
    """An argument that is a path; of the `kind` str where it may be a model's name."""
    return typer.Argument(help=help, metavar=metavar, parser=_path_parser(metavar.strip("[]."), kind))


def _path_parser(name: str, kind: type[str] | type[Path]) -> Callable[[str], str | Path]:
    def parse_path(text: str) -> str | Path:
        if not text:  # to pathlib the current folder, which is not what a variable means that nobody set
            raise InputError(f"Expected a path for {name}, found an empty text.", "Name one; the current folder is called '.'.")
        return kind(text)

    return parse_path


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document as the last line of stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notes; warnings stay.")]

ModelName = Annotated[str, typer.Argument(help="A name of `edgemed models list`.", metavar="NAME")]
ModelNames = Annotated[list[str] | None, typer.Argument(help="Names of `edgemed models list`. All where left out.", metavar="[NAME]...")]
Source = Annotated[
    str | None,
    path_argument(
        help="A checkpoint's folder, a GGUF file, or a name of `edgemed models list`. edgemed-demo where left out.",
        metavar="[SOURCE]",
        kind=str,
    ),
]
Folder = Annotated[Path | None, path_argument(help="A converted model's folder. edgemed-demo where left out.", metavar="[DIR]")]
Folders = Annotated[list[Path] | None, path_argument(help="Converted models' folders. edgemed-demo where left out.", metavar="[DIR]...")]
Model = Annotated[Path | None, path_option("--model", help="A converted model's folder. edgemed-demo where left out.", metavar="DIR")]
Question = Annotated[str, typer.Argument(help="What to ask.", metavar="QUESTION")]
Images = Annotated[
    list[Path] | None, path_option("--image", help="An image file, plain or DICOM; can be given several times.", metavar="FILE")
]
FrameNumber = Annotated[int, typer.Option("--frame", help="Which frame of a DICOM image, from 0.", metavar="N", min=0)]
WindowText = Annotated[
    str | None,
    typer.Option("--window", help="Grey levels shown, as in -600,1500; by default those that the file asks for.", metavar="CENTRE,WIDTH"),
]

Bits = Annotated[int | None, typer.Option("--bits", help="4, 8 or 16 bits a weight; 4 where nothing is said.", metavar="N")]
Quant = Annotated[
    str | None, typer.Option("--quant", help="GGUF type of the language model instead of --bits, as Q4_K_M, Q8_0 or F16.", metavar="TYPE")
]
VisionQuant = Annotated[str | None, typer.Option("--vision-quant", help="GGUF type of the vision tower instead of --bits.", metavar="TYPE")]
To = Annotated[
    str, typer.Option("--to", help="gguf, or hf: transformers' LlavaForConditionalGeneration, where fine-tuning starts.", metavar="FORMAT")
]
Calibrate = Annotated[
    str | None,
    typer.Option(
        "--calibrate",
        help="Round by what matters on a data set's training questions, and choose each matrix's type by it; needs the train extra.",
        metavar="NAME=PATH",
    ),
]
Samples = Annotated[
    int | None, typer.Option("--samples", help="With --calibrate: how many questions it reads; 256 by default.", metavar="N", min=1)
]
Budget = Annotated[
    str | None,
    typer.Option(
        "--budget", help="With --calibrate: what both files may take, as 0.8GB; by default what the plain recipe takes.", metavar="SIZE"
    ),
]
Out = Annotated[Path | None, path_option("--out", help="Folder to write; by default one under edgemed's own data folder.", metavar="DIR")]
Adapter = Annotated[Path | None, path_option("--adapter", help="A LoRA adapter (folder or GGUF) to merge.", metavar="PATH")]
Base = Annotated[Path | None, path_option("--base", help="The base that SOURCE is an adapter or a delta of.", metavar="PATH")]
VisionTower = Annotated[Path | None, path_option("--vision-tower", help="The tower's folder, where SOURCE only names it.", metavar="DIR")]
Mmproj = Annotated[Path | None, path_option("--mmproj", help="Tower and projector as a GGUF, where SOURCE is a GGUF.", metavar="FILE")]
Template = Annotated[
    str | None, typer.Option("--template", help="Conversation template, where the checkpoint does not tell.", metavar="NAME")
]
ImageMode = Annotated[
    str | None, typer.Option("--image-mode", help="How images were made square in training: pad, stretch or crop.", metavar="MODE")
]
Pre = Annotated[
    str | None, typer.Option("--pre", help="llama.cpp's name of the tokenizer's splitting rule, where it is unknown.", metavar="NAME")
]
Name = Annotated[str | None, typer.Option("--name", help="The converted model's name.", metavar="NAME")]
Threads = Annotated[int | None, typer.Option("--threads", help="Worker threads; by default one a core.", metavar="N", min=1)]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="Do not run the converted model once to check it.")]
Reference = Annotated[
    Path | None, path_option("--reference", help="The source checkpoint, to compare with transformers (train extra).", metavar="DIR")
]

MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Longest answer.", metavar="N", min=1)]
Context = Annotated[
    int | None, typer.Option("--context", help="Tokens of question and answer; by default enough for the images.", metavar="N", min=1)
]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token each time.", metavar="T", min=0.0)]
ProjectorSeed = Annotated[int, typer.Option("--seed", help="Seed of the projector's first weights.", metavar="N")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of the sampling, with a temperature above 0.", metavar="N")]

LlmFolder = Annotated[Path, path_option("--llm", help="A bare language model as an HF checkpoint.", metavar="DIR")]
TowerFolder = Annotated[Path, path_option("--tower", help="A CLIP or SigLIP vision tower as an HF checkpoint.", metavar="DIR")]
NewOut = Annotated[Path, path_option("--out", help="Folder to write; new or empty.", metavar="DIR")]
ImageToken = Annotated[
    str, typer.Option("--image-token", help="Token that stands for an image; added to the tokenizer where it is not there.", metavar="TEXT")
]
ImageSize = Annotated[
    int | None,
    typer.Option("--image-size", help="Image side where not the tower's own; its position embeddings are resampled.", metavar="PX", min=14),
]
FeatureLayer = Annotated[int, typer.Option("--feature-layer", help="Which of the tower's hidden states is used.", metavar="N")]
Config = Annotated[Path, path_option("--config", help="The stage's recipe as TOML; its keys are in docs/recipes.md.", metavar="FILE")]
Device = Annotated[str, typer.Option("--device", help="cpu, gpu (or cuda), rtx3050, rtx3080 or jetson.", metavar="NAME")]
LoadDevice = Annotated[
    str | None, typer.Option("--device", help="cpu, gpu or a named device's limits; the GPU where one is found.", metavar="NAME")
]
Users = Annotated[int, typer.Option("--users", help="Conversations at once, each with a context of its own.", metavar="N", min=1)]
Kv = Annotated[str | None, typer.Option("--kv", help="Type of the key-value cache, f16 or q8_0; chosen where left out.", metavar="TYPE")]
MicroBatch = Annotated[
    int | None, typer.Option("--micro-batch", help="Tokens computed at once; chosen where left out.", metavar="N", min=1, max=4096)
]
GpuLayers = Annotated[int | None, typer.Option("--gpu-layers", help="Layers on the GPU; chosen where left out.", metavar="N", min=0)]
Tower = Annotated[
    str | None, typer.Option("--tower", help="Where the vision tower is computed, gpu or cpu; chosen where left out.", metavar="WHERE")
]
Datasets = Annotated[
    list[str],
    typer.Option(
        "--dataset",
        help="A data set, as slake=PATH, slake:test=PATH or, for a fifth of its images, vqa-rad:all@1/5=PATH; can be given several times.",
        metavar="NAME=PATH",
    ),
]
Limit = Annotated[int | None, typer.Option("--limit", help="Only the first N questions of each data set.", metavar="N", min=1)]
Split = Annotated[str, typer.Option("--split", help="Which part of each data set.", metavar="NAME")]
Blank = Annotated[bool, typer.Option("--blank", help="Show an empty image each time: what a model answers without seeing.")]
Looks = Annotated[bool, typer.Option("--looks", help="Ask again with a blank, a mirrored and another image; tell how many answers stay.")]
CalibrateRun = Annotated[
    bool, typer.Option("--calibrate", help="Leave calibration.json beside the model: how often such answers are right, and when to refer.")
]
TrainedOn = Annotated[
    list[str] | None,
    typer.Option("--trained-on", help="What the model was trained on: images that are there too are counted.", metavar="NAME=PATH"),
]
RunFolder = Annotated[
    Path | None,
    path_option("--out", help="Keep predictions there, and go on from them where an earlier run was cut.", metavar="DIR"),
]
PredictionFile = Annotated[
    Path | None, path_option("--predictions", help="Score this prediction file (JSON lines) instead of asking a model.", metavar="FILE")
]
Endpoint = Annotated[
    str | None,
    typer.Option("--endpoint", help="Ask a server that speaks OpenAI's protocol; the key is read from OPENAI_API_KEY.", metavar="URL"),
]
EndpointModel = Annotated[str | None, typer.Option("--endpoint-model", help="The model's name at that server.", metavar="NAME")]
ReferenceModel = Annotated[
    Path | None,
    path_option("--reference", help="Ask transformers with a checkpoint of `edgemed finetune`; needs the train extra.", metavar="DIR"),
]
Slots = Annotated[int, typer.Option("--slots", help="Questions about one image that are answered at once.", metavar="N", min=1, max=256)]
Questions = Annotated[int, typer.Option("--questions", help="Questions that are measured, three to an image.", metavar="N", min=1)]
Save = Annotated[
    list[Path] | None,
    path_option("--save", help="Write the measurement as .json, .md or .png (plots extra); can be given several times.", metavar="FILE"),
]

JudgedQuestions = Annotated[
    Path, path_argument(help="JSON lines with reference answers, as LLaVA-Med's llava_med_eval_qa50_qa.jsonl.", metavar="QUESTIONS")
]
JudgedAnswers = Annotated[
    Path | None,
    path_argument(help="A model's answers to them: JSON lines with question_id and text; left out with --model.", metavar="[ANSWERS]"),
]
JudgedModel = Annotated[
    Path | None, path_option("--model", help="Have this converted model answer first, about the images of --image-folder.", metavar="DIR")
]
ImageFolder = Annotated[Path | None, path_option("--image-folder", help="Where the questions' images are.", metavar="DIR")]
JudgeOut = Annotated[
    Path, path_option("--out", help="Folder for replies, scores and tables; a run that was cut off goes on.", metavar="DIR")
]
JudgeName = Annotated[
    str | None,
    typer.Option("--judge", help="A model's name at an OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY.", metavar="NAME"),
]
Gguf = Annotated[Path | None, path_option("--gguf", help="Judge offline with this language model instead of an endpoint.", metavar="FILE")]
Instruction = Annotated[
    Path | None,
    path_option(
        "--instruction", help="What the judge is told to do, as LLaVA-Med's own text; a text of ours where left out.", metavar="FILE"
    ),
]
JudgeProtocol = Annotated[str, typer.Option("--protocol", help="LLaVA-Med's version, v1.5 or v1.0.", metavar="NAME")]
BothOrders = Annotated[
    bool, typer.Option("--both-orders", help="Ask twice with the answers exchanged: adds wins, ties and intervals to the protocol's table.")
]
Parallel = Annotated[int, typer.Option("--parallel", help="Questions asked of an endpoint at once.", metavar="N", min=1, max=64)]
Attempts = Annotated[
    int, typer.Option("--attempts", help="How often an endpoint is asked until its reply holds two scores.", metavar="N", min=1)
]
Prices = Annotated[
    str | None, typer.Option("--price", help="Dollars a million tokens of prompts and of replies, as 30,60.", metavar="PROMPT,REPLY")
]
EstimateOnly = Annotated[bool, typer.Option("--estimate", help="Tell what it will cost, and stop.")]

ResultFiles = Annotated[
    list[Path], path_argument(help="Files that `edgemed eval --json` and `edgemed bench --json` have written.", metavar="RESULTS...")
]
ParetoOut = Annotated[Path, path_option("--out", help="Folder for the picture, the document and the page.", metavar="DIR")]
ScoreProtocol = Annotated[str, typer.Option("--protocol", help="Which of an evaluation's protocols counts.", metavar="NAME")]
Metrics = Annotated[str | None, typer.Option("--metric", help="closed or open; both where left out.", metavar="NAME")]
WithPublished = Annotated[bool, typer.Option("--with-published", help="Show others' published figures beside ours.")]
PublishedFile = Annotated[
    Path | None, path_option("--published", help="Published figures of your own, in the form of published.toml.", metavar="FILE")
]
DeviceBudget = Annotated[
    str | None, typer.Option("--device", help="Name the best model for it: cpu, gpu, rtx3050, rtx3080 or jetson.", metavar="NAME")
]
MemoryBudget = Annotated[str | None, typer.Option("--budget", help="Name the best model within so much memory, as 4GB.", metavar="SIZE")]
LeastSpeed = Annotated[float, typer.Option("--min-speed", help="Least tokens a second of the best model.", metavar="N", min=0.0)]

Store = Annotated[
    Path | None, path_option("--store", help="The case store; by default the one in edgemed's own data folder.", metavar="FILE")
]
PassphraseFile = Annotated[
    Path | None,
    path_option("--passphrase-file", help="Read the passphrase from a file's first line; asked for without it.", metavar="FILE"),
]
NewPassphraseFile = Annotated[
    Path | None, path_option("--new-passphrase-file", help="Read the new passphrase from a file's first line.", metavar="FILE")
]
OwnPassphrase = Annotated[bool, typer.Option("--own-passphrase", help="Ask for a passphrase that only this backup has.")]
BackupTarget = Annotated[Path, path_argument(help="The file to write, or a folder, such as a stick's.", metavar="TARGET")]
BackupFile = Annotated[Path, path_argument(help="A file that `edgemed cases backup` wrote.", metavar="BACKUP")]
CaseName = Annotated[
    str, typer.Argument(help="A case's number from `edgemed cases list` (its beginning is enough), or its label.", metavar="CASE")
]
ExportFolder = Annotated[Path, path_option("--to", help="The folder to write into, such as a stick's; it must be there.", metavar="FOLDER")]
ExportKinds = Annotated[str, typer.Option("--as", help="pdf, md, fhir, dicom, sr: one or several, with commas between.", metavar="KINDS")]
WithIdentity = Annotated[bool, typer.Option("--with-identity", help="Name the patient in it: only where the patient has agreed.")]
Institution = Annotated[str, typer.Option("--institution", help="The clinic's name, to stand in the report.", metavar="NAME")]
Head = Annotated[
    str | None, typer.Option("--head", help="A hash noted earlier, or its first 16 digits: it must be in the log.", metavar="HASH")
]
Last = Annotated[int | None, typer.Option("--last", help="Only the newest N entries.", metavar="N", min=1)]

Watch = Annotated[Path | None, path_option("--watch", help="Offer new image files of this folder while a case is open.", metavar="DIR")]
Language = Annotated[str, typer.Option("--language", help="en, fr, sw, pt or ar; the user's setting where left out.", metavar="CODE")]
ReportLanguage = Annotated[
    str, typer.Option("--language", help="The report's words in en, fr, sw, pt or ar; the user's setting where left out.", metavar="CODE")
]
Look = Annotated[str, typer.Option("--theme", help="dark, light or contrast; the user's setting where left out.", metavar="NAME")]
Fake = Annotated[bool, typer.Option("--fake", help="Answers that are made up, without a model.", hidden=True)]

SourceSets = Annotated[list[str], typer.Argument(help="Data sets as NAME=PATH.", metavar="NAME=PATH...")]
Splits = Annotated[
    list[str] | None,
    typer.Option("--split", help="A part of each data set; can be given several times. train where left out.", metavar="NAME"),
]
TokenizerOf = Annotated[
    Path | None,
    path_option("--model", help="The checkpoint to train: also check labels and lengths with its tokenizer (train extra).", metavar="DIR"),
]
MaxRowTokens = Annotated[int, typer.Option("--max-tokens", help="Longest row that the recipe allows.", metavar="N", min=16)]
UrlList = Annotated[Path, path_argument(help="LLaVA-Med's list, llava_med_image_urls.jsonl.", metavar="LIST")]
FiguresOut = Annotated[Path, path_option("--out", help="Folder for the figures.", metavar="DIR")]
FiguresFor = Annotated[
    Path | None, path_option("--for", help="Only the figures that this LLaVA file names, as llava_med_instruct_10k.json.", metavar="FILE")
]
FiguresLimit = Annotated[int | None, typer.Option("--limit", help="Only the first N figures.", metavar="N", min=1)]
Jobs = Annotated[int, typer.Option("--jobs", help="Archives at once.", metavar="N", min=1, max=64)]
Mirror = Annotated[
    str | None, typer.Option("--mirror", help="What stands for everything before oa_package/ in the list's addresses.", metavar="URL")
]
RetryGone = Annotated[bool, typer.Option("--retry-gone", help="Ask again for what was gone or unusable.")]
HubSet = Annotated[str, typer.Argument(help="A data set of the hub, as flaviagiammarino/vqa-rad.", metavar="REPO")]
Revision = Annotated[str, typer.Option("--revision", help="Its branch, tag or commit.", metavar="NAME")]
HubSetOut = Annotated[Path, path_option("--out", help="Folder to write; it must not be there yet.", metavar="DIR")]
