"""Teachers, one file each: behaviour models whose vectors a loss may read, train part only.

`KINDS` is the registry of `teacher.kind`.
"""

from forge_ray.embed.teachers.artifact import Teacher, load_teacher
from forge_ray.embed.teachers.base import TeacherConfig
from forge_ray.embed.teachers.ppmi_svd import PpmiSvdConfig
from forge_ray.embed.teachers.sasrec import SasRecTeacherConfig
from forge_ray.embed.teachers.two_tower import TwoTowerConfig

KINDS: tuple[type[TeacherConfig], ...] = (PpmiSvdConfig, SasRecTeacherConfig, TwoTowerConfig)
"""Every kind of `TeacherConfig`; importing this package makes them known to `load_config`."""

__all__ = ["KINDS", "Teacher", "TeacherConfig", "load_teacher"]
