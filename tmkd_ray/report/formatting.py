"""How numbers are written, the same in the table, the summary and the page."""

MISSING = "–"


def signed(value: float, digits: int = 2) -> str:
    """`+1.25`, `−0.40`, `0.00`: no sign on what rounds to zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def percent(fraction: float) -> str:
    """`0.9512` as `95.12`; the unit is the caller's."""
    return f"{100 * fraction:.2f}"


def percent_with_std(mean: float, std: float | None) -> str:
    """`95.12 ± 0.31`, or `95.12` where there is no standard deviation."""
    return percent(mean) if std is None else f"{percent(mean)} ± {percent(std)}"


def duration(seconds: float) -> str:
    """`0.42 s`, `12.3 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def byte_size(num_bytes: float) -> str:
    """`512 B`, `1.5 KiB`, `23.4 MiB` … (powers of 1024)."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def count(number: int) -> str:
    """`1,234,567`."""
    return f"{number:,}"


def of(number: int, noun: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{count(number)} {noun}" if number == 1 else f"{count(number)} {noun}s"


def operations(number: float) -> str:
    """`850`, `12.5 M`, `3.1 G` … (powers of 1000)."""
    for unit in ("", " k", " M", " G"):
        if number < 999.5:
            return f"{number:.0f}" if unit == "" else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"
