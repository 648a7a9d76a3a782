"""Tests of the room student_evaluation."""
