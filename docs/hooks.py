"""What MkDocs calls while it builds the site: pages made of the code, the catalogues and results.

Nothing that is made here is checked in. The landing page is the README, a technique's page comes
from its documentation, options and results, and the catalogues and tables are copied.
"""

import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import examples_page
import technique_page
from links import rewritten, same_place

import diffalign as da

ROOT = Path(__file__).parents[1]
COPIES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "search/README.md": "search.md",
    "noise_opt/README.md": "noise_opt.md",
    "rewards/README.md": "rewards.md",
    "guidance/README.md": "guidance.md",
    "pruning/README.md": "pruning.md",
    "app/README.md": "app.md",
}
"""Pages of the repository -> their copies on the site."""
RESULTS = ROOT / "benchmarks" / "results"
GROUPS = ("techniques/*", "results/*")
"""What stands in the navigation for pages that are made."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write every technique and every result into the navigation."""
    pages = {
        "techniques/*": [f"techniques/{name}.md" for name in da.techniques()],
        "results/*": [f"results/{path.relative_to(RESULTS).as_posix()}" for path in tables()],
    }

    def entries(nav: Any) -> Any:
        if isinstance(nav, list):
            return [entries(entry) for entry in nav]
        if isinstance(nav, dict):
            return {title: entries(value) for title, value in nav.items()}
        return [nav.replace("*", "index.md"), *pages[nav]] if nav in GROUPS else nav

    config.nav = entries(config.nav)
    return config


def tables() -> list[Path]:
    """The pages of the results."""
    return sorted(RESULTS.rglob("*.md"))


def results_page() -> str:
    """The page that lists the results."""
    head = """# Results

The figures on the pages of techniques come from these tables, which the scripts in `benchmarks/`
write. Each says where it was measured and by which command; what did not help stands beside what
did.
"""
    titles = {path: path.read_text(encoding="utf-8").partition("\n")[0] for path in tables()}
    lines = [
        f"- [{title.lstrip('# ')}]({path.relative_to(RESULTS).as_posix()})"
        for path, title in titles.items()
    ]
    return head + "\n" + "\n".join(lines) + "\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and write the links of all as those of the site."""
    results = sorted(path for path in RESULTS.rglob("*") if path.suffix in (".md", ".png"))
    pages = same_place(file.src_uri for file in files)
    pages |= COPIES
    pages |= {
        path.relative_to(ROOT).as_posix(): f"results/{path.relative_to(RESULTS).as_posix()}"
        for path in results
    }
    for name, cls in da.techniques().items():
        pages[cls.__module__.replace(".", "/") + ".py"] = f"techniques/{name}.md"
    pages |= {path.relative_to(ROOT).as_posix(): "examples.md" for path in examples_page.FILES}

    for file in list(files):
        if file.is_documentation_page():
            place = f"docs/{file.src_uri}"
            text = rewritten(file.content_string, place, file.src_uri, pages)
            files.remove(file)
            files.append(File.generated(config, file.src_uri, content=text))
    for source, page in COPIES.items():
        text = rewritten((ROOT / source).read_text(encoding="utf-8"), source, page, pages)
        files.append(File.generated(config, page, content=text))
    for path in results:
        source = path.relative_to(ROOT).as_posix()
        if path.suffix == ".md":
            text = rewritten(path.read_text(encoding="utf-8"), source, pages[source], pages)
            files.append(File.generated(config, pages[source], content=text))
        else:
            files.append(File.generated(config, pages[source], abs_src_path=str(path)))
    fresh = {
        "examples.md": examples_page.page(),
        "techniques/index.md": technique_page.index(),
        "results/index.md": results_page(),
    }
    fresh |= {f"techniques/{name}.md": technique_page.page(name) for name in da.techniques()}
    for page, text in fresh.items():
        files.append(File.generated(config, page, content=text))
    return files
