"""Tables of a page, from escaped cells."""

from collections.abc import Iterable


def table(head: Iterable[str], rows: Iterable[Iterable[str]], *, css: str) -> str:
    """A table from escaped cells; wide ones scroll in a box of their own."""
    header = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "\n".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{css}">\n'
        f"<thead><tr>{header}</tr></thead>\n"
        f"<tbody>\n{body}\n</tbody></table></div>"
    )
