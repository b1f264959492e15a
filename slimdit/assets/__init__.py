"""Files that come with the package, and how they are made (`build.py`)."""
