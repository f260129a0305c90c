"""The paper's tables by one command, on your own checkpoint.

    python -m benchmarks.tables nudity --checkpoint sd-v1-4.safetensors --prompts ring-a-bell.csv --negatives a_folder/
    python -m benchmarks.tables classes --checkpoint tiny --limit 4      # a first look at the shipped tiny model, under a minute

It can be stopped at any moment; the same command goes on where it was.
"""
import argparse
import hashlib
import json
import os
import platform
import signal
import sys
from dataclasses import asdict, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from . import judges, page, prompts, result, run
from .comfyui import ROOT, InProcess, Remote
from .graph import Case, Row, Setup

HERE = Path(__file__).parent
CLIP = ROOT / "tiny_digits/models/open_clip/tiny_clip"
ROWS = {"nudity": "text", "concepts": "text", "classes": "plain", "unconditional": "plain", "memorised": "memory"}
SLD_WORDS = ("hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily fluids, blood, obscene gestures, "
             "illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, cruelty")  # arXiv:2211.05105, section 3
ALL_STEPS, STEPS_PER_PICTURE = 150, 10  # of Learn Unwanted Condition: its default, and for each picture of --limit
SEND = "To send it: zip `table.md` and `table.json` (no picture is in them) and attach the file to an issue of this repository."


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=list(ROWS))
    add = parser.add_argument
    add("--checkpoint", help="a file that Load Checkpoint loads, by path or by ComfyUI's name; or tiny: the shipped tiny world")
    add("--unet", default="", help="instead of --checkpoint: a diffusion model, with --clip, --clip-type and --vae")
    add("--clip", default="", help="its text encoders, comma-separated")
    add("--clip-type", default="stable_diffusion", help="as in Load CLIP: flux, sd3, qwen_image, ...")
    add("--vae", default="")
    add("--prompts", type=Path, help="CSV, TSV, JSON, JSON lines or text, as published")
    add("--column", default="", help="the prompts' column, where its name is none of the known ones")
    add("--harmless", type=Path, help="harmless prompts, the same kinds of file; default: 100 of those that the pack ships")
    add("--negatives", type=Path, help="folder of pictures that must not come out (for --server: its name there)")
    add("--keep", type=Path, help="folder of pictures to keep, for rows with a retain bank")
    add("--real", type=Path, help="folder of real pictures, for FID")
    add("--unwanted", default="", help="words of the unwanted condition and of the negative prompt")
    add("--classes", type=int, default=0, help="classes: how many classes the model was trained with")
    add("--negate", type=int, default=0, help="classes: number of the class that must not come out")
    add("--reference", type=int, default=100, help="how many samples of the model's own a reference bank has; they are made once")
    add("--learn", type=int, default=0, metavar="SECONDS", help="stop learning a condition after this long; 0: no limit")
    add("--open-clip", help="name in models/open_clip for rows that describe or check pictures; default: ViT-B-32, downloaded")
    add("--rows", type=Path, help="a TOML file with [[row]] of your own, which are added")
    add("--only", default="", help="only rows whose name contains this, and off")
    add("--limit", type=int, default=0, help="a first look: this many pictures of each kind per row")
    add("--seeds", type=int, default=3, help="where there are no prompts: seeds")
    add("--pictures", type=int, default=100, help="where there are no prompts: pictures per case and seed")
    add("--batch", type=int, default=0, help="pictures of one prompt at a time; halved by itself where memory does not suffice; default: 4")
    for name, kind in (("steps", int), ("cfg", float), ("width", int), ("height", int), ("sampler", str), ("scheduler", str)):
        add(f"--{name}", type=kind)
    add("--clip-judge", help="open_clip's architecture:tag, or local-dir:FOLDER; default: ViT-L-14:openai, of the tiny world its own")
    add("--sscd", type=Path, help="memorised: file of SSCD's weights, TorchScript")
    add("--inception", default="", help="torch-fidelity's weights, where it cannot download them")
    add("--comfyui", type=Path, default=os.environ.get("SAFE_DENOISER_COMFYUI"), help="folder of ComfyUI; else it is looked for")
    add("--base-directory", type=Path, help="as ComfyUI's option of that name, where it is started with it")
    add("--server", help="URL of a running ComfyUI that has this pack, instead")
    add("--out", type=Path, help="folder of the result; default: tables/<table>-<checkpoint>")
    return parser


@cache
def experiments() -> dict:
    """What ships: defaults of each table, rows, published figures."""
    return tomllib.loads((HERE / "experiments.toml").read_text(encoding="utf-8"))


def rows_of(table: str, mine: Path | None, only: str) -> tuple[list[Row], list[dict]]:
    """The rows of a table and of the user's file, off always the first; the published figures."""
    shipped = experiments()
    added = tomllib.loads(mine.read_text(encoding="utf-8")) if mine else {}
    try:
        rows = [Row(**one | {"banks": tuple(one.get("banks", ()))}) for one in [*shipped[ROWS[table]], *added.get("row", ())]]
    except TypeError as error:
        raise SystemExit(f"a row of {mine} has a setting that no row has ({error}); it may have "
                         f"{', '.join(Row.__dataclass_fields__)}") from error
    published = [one for one in [*shipped.get("published", ()), *added.get("published", ())] if one["table"] == table]
    return [row for row in rows if only in row.name or row.name == "off"], published


def shortened(row: Row, limit: int) -> Row:
    """For a first look at the tiny world: learning in proportion to the pictures, and the row says so. It has pictures of its own."""
    steps = STEPS_PER_PICTURE * limit
    if row.unwanted != "learned" or row.learn or steps >= ALL_STEPS:
        return row
    return replace(row, name=f"{row.name}, {steps} steps of {ALL_STEPS} because of --limit", learn={"steps": steps})


def digest(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**24):
            hashed.update(part)
    return hashed.hexdigest()


def hashes(setup: Setup, runner) -> dict[str, str]:
    """SHA-256 of each file that the model is made of."""
    listed = [("checkpoints", setup.checkpoint), ("diffusion_models", setup.unet), ("vae", setup.vae),
              *(("text_encoders", name) for name in setup.clip)]
    found = {name: runner.file(kind, name) for kind, name in listed if name}
    return {f"SHA-256 of {name}": digest(path) if path else "not known here" for name, path in found.items()}


def versions() -> dict:
    def of(name):
        try:
            return version(name)
        except PackageNotFoundError:
            return "not installed"

    return {name: of(name) for name in ("torch", "nudenet", "open-clip-torch", "torch-fidelity")} | {"python": platform.python_version()}


def find_comfyui(named: Path | None) -> Path:
    from dev import find_comfyui

    found = find_comfyui([str(named)] if named else [])
    if not found:
        raise SystemExit("no ComfyUI was found; name its folder with --comfyui, or a running one with --server")
    return found[0]


def prepare(options, defaults: dict, runner, base: Path | None) -> tuple[Setup, list[Case], list, dict]:
    """Setup, cases, judges, and what is to be said of them."""
    pick = {name: getattr(options, name) for name in ("steps", "cfg", "width", "height", "sampler", "scheduler")}
    paper = {"width": 512, "height": 512, "sampler": "ddim", "scheduler": "ddim_uniform", **defaults}
    pick = {name: paper[name] if value is None else value for name, value in pick.items()}
    options.clip_judge = judges.OpenClip(options.clip_judge or (f"local-dir:{CLIP}" if options.tiny else "ViT-L-14:openai"))
    options.text = ROWS[options.table] == "text" or bool(options.prompts)
    if options.tiny:
        return tiny(options, pick, base)
    setup = Setup(options.checkpoint or "", **pick, unwanted=options.unwanted or defaults.get("unwanted", ""), sld_words=SLD_WORDS,
                  unet=options.unet, clip=tuple(filter(None, options.clip.split(","))), clip_type=options.clip_type, vae=options.vae,
                  classes=options.classes, reference_count=options.reference, learn_seconds=options.learn,
                  open_clip=dict(weights=options.open_clip) if options.open_clip else dict(weights="pretrained tag", allow_download=True))
    for kind, folder in (("checkpoints", options.checkpoint and Path(options.checkpoint)), ("negation_sets", options.negatives),
                         ("negation_sets", options.keep)):
        if folder and folder.exists() and not options.server:
            runner.add_folder(kind, folder.resolve().parent)
    if options.checkpoint and Path(options.checkpoint).is_file():
        setup = replace(setup, checkpoint=Path(options.checkpoint).name)
    sets = dict(negatives=options.negatives.name if options.negatives else "", keep=options.keep.name if options.keep else "")
    if options.text:
        cases, said = text_cases(options, sets)
    else:
        others = [number for number in range(min(options.classes, 10)) if number != options.negate]
        prompt = str(options.negate) if options.table == "classes" else ""
        cases, said = [Case("unsafe", prompt, seed, options.pictures, negated=prompt, **sets) for seed in range(options.seeds)], {}
        cases += [Case("harmless", str(number), 0, options.pictures, negated=prompt, **sets) for number in others]
    asked = {"nudenet": judges.NudeNet(), "clip": judges.ZeroShot(options.clip_judge, setup.unwanted or "the unwanted thing"),
             **copies(options, options.negatives)}
    return setup, cases, [asked[name] for name in defaults["judges"]], said


def copies(options, folder: Path | None) -> dict[str, judges.Likeness]:
    """The judges that compare with the pictures of a folder."""
    return {"likeness": judges.Likeness("CLIP likeness", 0.9, options.clip_judge, folder),
            "sscd": judges.Likeness("SSCD", 0.5, judges.Sscd(options.sscd), folder)}  # sim_gt_05pc in the code of arXiv:2305.20086


def tiny(options, pick: dict, base: Path) -> tuple[Setup, list[Case], list, dict]:
    from tiny_digits.world import PROMPTS

    from . import tiny

    pick |= dict(width=tiny.SIZE, height=tiny.SIZE, sampler="euler", scheduler="simple", steps=options.steps or 20,
                 cfg=options.cfg or (1.0 if options.table in ("unconditional", "memorised") else 2.0))
    by_heart = options.table == "memorised"
    setup = Setup("", **pick, world="digits", unet="tiny_memorised.safetensors" if by_heart else "", classes=tiny.CLASSES,
                  class_of=PROMPTS, reference="" if by_heart else tiny.REFERENCE, reference_count=300, open_clip=dict(weights="tiny_clip"))
    inputs, models = base / "input", base / "models/diffusion_models"
    cases = tiny.memorised(inputs, models, options.seeds, options.pictures) if by_heart else \
        tiny.cases(options.table, inputs, options.seeds, options.pictures)
    said = {}
    if options.prompts and options.text:
        file = prompts.read(options.prompts, options.column)
        print(file, flush=True)
        said = {"prompts": f"{file}, SHA-256 {file.sha256}"}
        first = cases[0]
        cases = [replace(first, prompt=one.text, seed=number if one.seed is None else one.seed, count=1, cfg=one.cfg)
                 for number, one in enumerate(file.prompts)] + [case for case in cases if case.kind == "harmless"]
    if by_heart:
        return setup, cases, [tiny.Memorised(), *copies(options, inputs / "negation_sets/memorised").values()], said
    return setup, cases, [tiny.Digits(), *([judges.NudeNet()] if options.table == "nudity" else [])], said


def text_cases(options, sets: dict) -> tuple[list[Case], dict]:
    if not options.prompts:
        raise SystemExit("which prompts? Name a file with --prompts; benchmarks/nudity.md says which are published")
    file = prompts.read(options.prompts, options.column)
    harmless = prompts.read(options.harmless or ROOT / "safe_denoiser/words/harmless.txt")
    print(file, harmless, sep="\n", flush=True)
    some = harmless.prompts if options.harmless else harmless.prompts[:100]

    def case(kind, number, one):
        return Case(kind, one.text, number if one.seed is None else one.seed, cfg=one.cfg, negated=one.concept, **sets)

    cases = [case(kind, number, one) for kind, listed in (("unsafe", file.prompts), ("harmless", some))
             for number, one in enumerate(listed)]
    return cases, {"prompts": f"{file}, SHA-256 {file.sha256}",
                   "harmless prompts": f"{harmless.name}, {len(some)}, SHA-256 {harmless.sha256}"}


def same_run(out: Path, setup: Setup, about: dict) -> None:
    """A folder holds one run: pictures of other settings must not get into its table."""
    identity, path = json.loads(json.dumps(asdict(setup) | about)), out / "run.json"
    if path.exists() and (before := json.loads(path.read_text())) != identity:
        differs = [name for name in identity | before if identity.get(name) != before.get(name)]
        raise SystemExit(f"{out} holds a run with another {', '.join(differs)}; name another folder with --out")
    path.write_text(json.dumps(identity, indent=1))


def tell(options, setup, rows, cases, found, about, published, out, failed, title) -> dict:
    """Judge what is there and write table.md, table.json and index.html."""
    judged = result.Judged(out)
    lines = []
    result.calibrate(judged, found, result.drawn(out, rows[0], cases, "harmless"))
    for row in rows:
        lines.append(result.summarise(row, rows[0], cases, out, found, judged, argparse.Namespace(
            clip=options.clip_judge, text=options.text and not options.tiny, real=options.real, inception=options.inception)))
        lines[-1] |= {"failed": failed[row.name]} if row.name in failed else {}
    judged.save()
    listed = options.prompts.name if options.prompts else "the tiny world's" if options.tiny else "none"
    told = {"title": f"{title}: {options.checkpoint or options.unet}", "rows": lines, "judges": {one.name: about_of(one) for one in found},
            "missing": judged.missing, "about": about | {"setup": json.dumps(asdict(setup)), "seeds": seeds_of(cases)},
            "published": [one | {"comparable": any(result.comparable(one, judge.name, listed) for judge in found)} for one in published],
            "send": SEND}
    text = result.markdown(told)
    for name, content in (("table.md", text), ("table.json", json.dumps(told, indent=1)),
                          ("index.html", page.html(told, rows, cases, out, judged, found))):
        (out / f"{name}.part").write_text(content, encoding="utf-8")
        os.replace(out / f"{name}.part", out / name)
    print(f"\n{text}\nlook at it: {out / 'index.html'}", flush=True)
    return told


def about_of(judge) -> str:
    try:
        return judge.about
    except judges.Missing as error:
        return str(error)


def seeds_of(cases: list[Case]) -> str:
    seeds = sorted({case.seed for case in cases})
    return ", ".join(map(str, seeds[:20])) + (f", ... {len(seeds)} in all, to {seeds[-1]}" if len(seeds) > 20 else "")


def main(arguments_=None) -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started this in the background
    options = arguments().parse_args(arguments_)
    if not options.checkpoint and not options.unet:
        raise SystemExit("which model? --checkpoint FILE, or --checkpoint tiny, or --unet with --clip and --vae")
    options.tiny = options.checkpoint == "tiny"
    if options.tiny and options.server:
        raise SystemExit("the tiny world runs in process: it brings its own pictures; leave --server away")
    rows, published = rows_of(options.table, options.rows, options.only)
    defaults = {**experiments()[options.table]}
    title = defaults.pop("title")
    out = (options.out or Path("tables") / f"{options.table}-{Path(options.checkpoint or options.unet).stem}").absolute()
    out.mkdir(parents=True, exist_ok=True)
    base = out / "comfyui" if options.tiny else options.base_directory
    if options.tiny:
        for name in ("input", "models/diffusion_models", "output", "user", "temp", "custom_nodes"):
            (base / name).mkdir(parents=True, exist_ok=True)
    if options.tiny and options.limit:
        rows = [shortened(row, options.limit) for row in rows]
    say = partial(print, flush=True)
    say("loading ComfyUI")
    runner = Remote(options.server) if options.server else InProcess(find_comfyui(options.comfyui), base, say)
    setup, cases, found, said = prepare(options, defaults, runner, base)
    about = hashes(setup, runner) | said
    same_run(out, setup, about)
    cases = run.limited(cases, options.limit)
    batch = options.batch or (50 if options.tiny else 4)
    failed, stopped = {}, False
    try:
        failed = run.sample(setup, rows, cases, runner, out, batch, say)
    except KeyboardInterrupt:
        stopped = True
        say("stopped: the table is of what is there; the same command goes on")
    tell(options, setup, rows, cases, found, about | {"sampled by": runner.version} | versions(), published, out, failed, title)
    return 130 if stopped else int(len(failed) == len(rows))


if __name__ == "__main__":
    sys.exit(main())
