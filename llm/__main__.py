import sys

if sys.version_info < (3, 11):  # noqa: UP036 (without the environment it may be any Python)
    sys.exit("error: Python 3.11 or newer is needed: source .venv/bin/activate, which make setup makes")

from llm_from_scratch import main

sys.exit(main())
