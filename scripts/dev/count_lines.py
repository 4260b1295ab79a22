"""Print the lines of each source file, longest first in its folder, and the total."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("schedulers", "engine")


def count(path: Path) -> int:
    return len(path.read_text().splitlines())


def main() -> None:
    total = 0
    for name in FOLDERS:
        sizes = {path: count(path) for path in (ROOT / name).rglob("*.py")}
        for path, lines in sorted(sizes.items(), key=lambda item: (item[0].parent, -item[1])):
            print(f"{lines:6,}  {path.relative_to(ROOT)}")
        total += sum(sizes.values())
        print(f"{sum(sizes.values()):6,}  {name}, {len(sizes)} files\n")
    print(f"{total:6,}  total")


if __name__ == "__main__":
    main()
