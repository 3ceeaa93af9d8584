{{/* (root, component, values, gpus, runs): spec of a trainer's pod; `runs`: after how many it ends */}}
{{- define "offbeat.trainerPod" -}}
{{- include "offbeat.placement" . | nindent 0 }}
{{- if and .root.Values.trainer.gpus .root.Values.gpu.runtimeClassName }}
runtimeClassName: {{ .root.Values.gpu.runtimeClassName }}
{{- end }}
securityContext:
  {{- include "offbeat.podSecurity" 10001 | nindent 2 }}
terminationGracePeriodSeconds: {{ .root.Values.trainer.terminationGraceSeconds }}
containers:
  - name: trainer
    image: {{ include "offbeat.image" . | quote }}
    imagePullPolicy: {{ .root.Values.image.pullPolicy }}
    env:
      {{- include "offbeat.environment" .root | nindent 6 }}
      - {name: OMP_NUM_THREADS, value: {{ .root.Values.trainer.threads | quote }}}
      {{- with .runs }}
      - {name: OFFBEAT_TRAINER_RUNS, value: {{ . | quote }}}
      {{- end }}
    ports:
      - {name: http, containerPort: 8700}
    {{- include "offbeat.probes" 300 | nindent 4 }}
    resources:
      {{- include "offbeat.modelResources" . | nindent 6 }}
    securityContext:
      {{- include "offbeat.containerSecurity" . | nindent 6 }}
    volumeMounts:
      {{- include "offbeat.trainerMounts" . | nindent 6 }}
volumes:
  {{- include "offbeat.trainerVolumes" .root | nindent 2 }}
{{- end }}

{{- define "offbeat.trainerMounts" -}}
- {name: tmp, mountPath: /tmp}
- {name: shared-memory, mountPath: /dev/shm}
- {name: runs, mountPath: /data}
- {name: models, mountPath: /models, readOnly: true}
- {name: secrets, mountPath: /run/secrets/offbeat, readOnly: true}
{{- end }}

{{/* root */}}
{{- define "offbeat.trainerVolumes" -}}
- name: tmp
  emptyDir: {}
- name: shared-memory
  emptyDir: {medium: Memory, sizeLimit: {{ .Values.trainer.sharedMemory | quote }}}
- name: runs
  persistentVolumeClaim: {claimName: {{ include "offbeat.claim" (dict "root" . "name" "runs") }}}
- name: models
  persistentVolumeClaim: {claimName: {{ include "offbeat.claim" (dict "root" . "name" "models") }}}
{{- include "offbeat.secretVolume" (dict "root" . "keys" (list "cluster-token" "redis-password")) | nindent 0 }}
{{- end }}
