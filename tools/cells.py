"""What a reader need not see: cells for the book's machinery, and imports. The site leaves them out or folds them, `make lab` folds them."""
import ast
import re


def hidden(source):
    """Marked by a directive of nbdev."""
    return bool(re.search(r"^#\|\s*(hide|default_exp)\b", source, re.M))


def bare(source):
    """A cell without its directives."""
    return re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")


def silent(source):
    """Only what it shows is for reading."""
    return bool(re.search(r"^#\|\s*echo:\s*false", source, re.M))


def only_imports(source):
    """Nothing but imports, and the setting that some of them need."""
    code = bare(source)
    if not re.match(r"\s*(#.*\n)*\s*(import|from)\b", code):
        return False
    try:
        body = ast.parse(re.sub(r"^[%!].*$", "", code, flags=re.M)).body
    except SyntaxError:
        return False
    return all(isinstance(n, (ast.Import, ast.ImportFrom)) or "environ.setdefault" in ast.unparse(n) for n in body)
