"""Pipeline parallelism: stages, schedules, and their timelines on paper."""
