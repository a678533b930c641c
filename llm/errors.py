class UserError(Exception):
    """Something the user can put right. The message is one line: what was found, where, and the way out."""
