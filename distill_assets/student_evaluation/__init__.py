"""How close the student came to its teacher on rows it never saw: figures, pictures, a report."""
