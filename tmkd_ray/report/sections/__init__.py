"""The sections of the page, a file for each kind; all are made from records alone."""
