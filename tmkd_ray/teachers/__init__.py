"""Frozen teachers: the visual teacher, and CLIP as the text teacher."""

from tmkd_ray.teachers.clip import ClipTeacher
from tmkd_ray.teachers.frozen import FrozenTeachers
from tmkd_ray.teachers.visual import VisualTeacher

__all__ = ["ClipTeacher", "FrozenTeachers", "VisualTeacher"]
