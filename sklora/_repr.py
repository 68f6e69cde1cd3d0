"""Where the HTML display of an estimator links to: the documentation that the package declares."""

from __future__ import annotations

from functools import cache


class DocumentedMixin:
    """Links the display of a public estimator to its page of the reference.

    The address is that of ``Project-URL: Documentation, ...`` in the metadata of the installed
    package. Without one there is no link: one that nobody keeps could come to belong to anybody.
    """

    _doc_link_module = "sklora"

    @property
    def _doc_link_template(self) -> str:
        address = documentation_address()
        return f"{address}/generated/sklora.{{estimator_name}}.html" if address else ""


@cache
def documentation_address() -> str:
    """Give the address of the documentation without a slash at its end, or ``""``.

    Returns
    -------
    str

    Examples
    --------
    >>> from sklora._repr import documentation_address
    >>> documentation_address().endswith("/")
    False
    """
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        urls = metadata("sklora").get_all("Project-URL") or []
    except PackageNotFoundError:
        return ""
    for url in urls:
        label, _, address = url.partition(",")
        if label.strip().lower() == "documentation":
            return str(address).strip().rstrip("/")
    return ""
