{{/* (root, component, values, gpus): spec of a trainer's pod */}}
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
      {{- include "offbeat.trainerEnvironment" .root | nindent 6 }}
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

{{/* root: what a trainer has beside what all have */}}
{{- define "offbeat.trainerEnvironment" -}}
- {name: OMP_NUM_THREADS, value: {{ .Values.trainer.threads | quote }}}
- {name: OFFBEAT_WEIGHT_TRANSPORT, value: {{ .Values.trainer.weightTransport }}}
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

{{/* root: what the control plane makes the Job of a run of. It adds the run, and a name of its own. */}}
{{- define "offbeat.trainerJob" -}}
{{- $part := dict "root" . "component" "trainer" "values" .Values.trainer "gpus" .Values.trainer.gpus -}}
apiVersion: batch/v1
kind: Job
metadata:
  {{- include "offbeat.metadata" $part | nindent 2 }}
spec:
  backoffLimit: 6  # of its pods: the run is queued for the next one, and goes on from its last checkpoint
  podFailurePolicy:
    rules:
      - action: Ignore  # a node that is drained is nobody's failure
        onPodConditions: [{type: DisruptionTarget, status: "True"}]
  ttlSecondsAfterFinished: 3600
  template:
    metadata:
      labels:
        {{- include "offbeat.labels" $part | nindent 8 }}
      annotations:
        cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
    spec:
      restartPolicy: Never
      {{- include "offbeat.trainerPod" $part | nindent 6 }}
{{- end }}
