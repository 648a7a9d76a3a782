"""The parts of the quality benchmark: text, teacher, arms, students, figures, picture."""
