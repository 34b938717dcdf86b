"""Configuration files as YAML: read, and refused by name where they are not a mapping of sections."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastcpt import UserError


def load(text: str) -> Any:
    """YAML -> plain values. `from` is a keyword of Python, so the field of `init` is `from_`."""
    import yaml

    value = yaml.safe_load(text)
    if isinstance(value, dict) and isinstance(value.get("init"), dict) and "from" in value["init"]:
        value["init"]["from_"] = value["init"].pop("from")
    return value


def find(name: str) -> str:
    """A file as it is, else the preset of that name. Raises UserError when there is neither."""
    presets = {path.stem: str(path) for path in sorted((Path(__file__).parent / "presets").glob("*.yaml"))}
    if not Path(name).is_file() and name not in presets:
        message = (
            f"{name}: there is no such configuration file, and no preset of that name: they are {', '.join(presets)}"
        )
        raise UserError("config-missing", message)
    return name if Path(name).is_file() else presets[name]


def check(file: str, sections: Sequence[str]) -> None:
    """Raises UserError when a file is not a configuration's outline: a mapping of sections, each a mapping."""
    import yaml

    try:
        content = load(Path(file).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError("config-not-yaml", f"{file}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError("config-not-a-mapping", f"{file}: not a mapping of sections ({', '.join(sections)})")
    for section, value in content.items():
        if section not in sections:
            raise UserError(
                "section-unknown", f"{file}: there is no section {section!r}; there are {', '.join(sections)}"
            )
        if not isinstance(value, dict):
            raise UserError(
                "config-not-a-mapping",
                f"{file}: the section {section} is {value!r}, not a mapping; give its fields or remove it",
            )
